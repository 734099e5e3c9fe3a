# make demo: install, train, sample and report.   make test: everything that a change must pass.
# Each target installs what it needs into .venv; PYTHON, VENV and TORCH may be set, e.g. make TORCH=torch==2.12.0 test.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
RUN := $(BIN)/python
SOURCES := $(shell find csrc build_backend -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') setup.py pyproject.toml

.PHONY: install demo docs figures test test-library test-kernels test-packaging fuzz sanitize coverage mutation versions lint format bench bench-compare gpu-report clean

install: $(VENV)/.installed

# torch first and alone, so that nothing else chooses it: the CPU build where there is no NVIDIA driver and the configured
# package index has one, else the default build. A torch that is already in the environment is kept.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -c 'import torch' 2>/dev/null \
	  || { ! command -v nvidia-smi >/dev/null 2>&1 && $(RUN) -m pip install --quiet '$(TORCH)+cpu' 2>/dev/null; } \
	  || $(RUN) -m pip install --quiet '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(RUN) -m pip install --quiet --editable '.[train,test,docs]'
	$(RUN) -m flowseg_kernels.info
	touch $@

demo: install
	$(RUN) -m flowseg demo --out demo_out

# Two test runs at once, a core each and about as long; the second one's output follows the first one's.
test: install lint docs
	mkdir -p build
	$(MAKE) --no-print-directory --keep-going test-kernels test-packaging >build/test-kernels.log 2>&1 & kernels=$$!; \
	$(MAKE) --no-print-directory test-library; status=$$?; \
	wait $$kernels || status=1; cat build/test-kernels.log; exit $$status

test-library:
	FLOWSEG_REQUIRE_BACKENDS=reference,cpu OMP_NUM_THREADS=1 $(RUN) -m pytest tests \
	  --ignore tests/flowseg_kernels/cuda --ignore tests/flowseg_kernels/static --ignore tests/packaging

test-packaging:
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/packaging

# GPU kernels without a GPU: Triton's interpreted, CUDA's on the host shim, both as machine code. Without nvcc the machine code of the
# CUDA kernels is left out, and the last lines say so; make PROOFS=emulated,triton_code,cuda_code makes that a failure.
PROOFS ?= emulated,triton_code$(shell PATH="$$PATH:$$CUDA_HOME/bin:/usr/local/cuda/bin"; command -v nvcc >/dev/null && echo ,cuda_code)
test-kernels:
	TRITON_INTERPRET=1 FLOWSEG_REQUIRE_BACKENDS=triton OMP_NUM_THREADS=1 $(RUN) -m pytest \
	  tests/flowseg_kernels/ops tests/flowseg_kernels/test_contract.py tests/fuzz tests/test_last.py
	FLOWSEG_REQUIRE_PROOFS=$(PROOFS) OMP_NUM_THREADS=1 $(RUN) -m pytest tests/flowseg_kernels/cuda tests/flowseg_kernels/static tests/test_last.py

# What is too long for every change: CONTRIBUTING.md says how long.
fuzz: install
	for backend in reference cpu cuda triton; do OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --backend $$backend --cases 20000 || exit 1; done

sanitize: install
	$(RUN) -m tests.sanitize all

coverage: install
	$(RUN) -m tests.coverage

mutation: install
	$(RUN) -m tests.mutation

# Environments with other torches and other Pythons, which are downloaded: some 3 GB each.
versions: install
	$(RUN) -m tests.versions

# The site, in build/docs; a warning (a link that leads nowhere, a name without an entry) is an error.
docs: install
	$(RUN) -m sphinx -b html -E -W --keep-going -q docs build/docs

# Draws the pictures of docs/method.md anew, from our own ops.
figures: install
	$(RUN) -m docs.figures

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Our kernels against their peers, on an otherwise idle machine: about 20 minutes, in parts. Each part is stored and rendered as it
# ends; cut, it goes on where it was when it is started again.
bench: $(VENV)/.bench
	$(RUN) -m bench run

# Fails when our kernels became slower than the stored results of this machine, when none are stored, or when an entry vanished.
bench-compare: $(VENV)/.bench
	$(RUN) -m bench run -k ours --again --progress build/bench-compare
	$(RUN) -m bench compare build/bench-compare/*.json

# On a machine with a GPU, with .venv where there is one, else with PYTHON: nothing is installed or downloaded. docs/guides/gpu.md says more.
gpu-report:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m bench gpu

$(VENV)/.bench: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info flowseg_kernels/lib/*.so flowseg_kernels/lib/*.json
