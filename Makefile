# make demo: install, train, sample and report.   make test: all checks that a change must pass.
# Each target installs its dependencies into .venv. PYTHON, VENV and TORCH can be set, e.g. make TORCH=torch==2.12.0 test.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
RUN := $(BIN)/python
SOURCES := $(shell find csrc build_backend -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') setup.py pyproject.toml

# The test runs of `make test`, longest first. They are independent of each other; each uses one core.
TESTS := test-ops test-interpreted test-machine-code test-stack test-tools test-packaging test-host-cuda
# Test runs at the same time.
JOBS ?= 2

.PHONY: install demo docs figures test $(TESTS) fuzz sanitize coverage mutation versions lint format bench bench-compare gpu-report clean

install: $(VENV)/.installed

# Install torch first, or another package would choose its version: the CPU build if there is no NVIDIA driver and the package index
# has one, else the default build. A torch that is already in the environment is kept.
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

# Run $(JOBS) of the test runs at a time; the output of each is shown when it ends.
test: install lint
	$(MAKE) --no-print-directory --jobs=$(JOBS) --keep-going --output-sync=target $(TESTS) docs

test-stack:
	FLOWSEG_REQUIRE_BACKENDS=reference,cpu OMP_NUM_THREADS=1 $(RUN) -m pytest tests/flowseg

test-ops:
	FLOWSEG_REQUIRE_BACKENDS=reference,cpu OMP_NUM_THREADS=1 $(RUN) -m pytest tests/flowseg_kernels tests/fuzz tests/test_last.py \
	  --ignore tests/flowseg_kernels/cuda --ignore tests/flowseg_kernels/static

# Everything that no other test run covers.
test-tools:
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests --ignore tests/flowseg --ignore tests/flowseg_kernels --ignore tests/fuzz \
	  --ignore tests/packaging

test-packaging:
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/packaging

# The GPU kernels without a GPU: Triton kernels in the interpreter, CUDA kernels on the host shim, both as machine code.
test-interpreted:
	TRITON_INTERPRET=1 FLOWSEG_REQUIRE_BACKENDS=triton OMP_NUM_THREADS=1 $(RUN) -m pytest \
	  tests/flowseg_kernels/ops tests/flowseg_kernels/test_contract.py tests/fuzz tests/test_last.py

test-host-cuda:
	FLOWSEG_REQUIRE_BACKENDS=cuda OMP_NUM_THREADS=1 $(RUN) -m pytest -p tests.host_cuda.plugin \
	  tests/flowseg_kernels/ops tests/fuzz tests/test_last.py
	FLOWSEG_REQUIRE_BACKENDS=cuda OMP_NUM_THREADS=1 $(RUN) -m pytest -p tests.host_cuda.plugin \
	  tests/flowseg_kernels/test_contract.py -k field
	FLOWSEG_REQUIRE_PROOFS=emulated OMP_NUM_THREADS=1 $(RUN) -m pytest --few-forms tests/flowseg_kernels/cuda tests/test_last.py

# Without nvcc the machine code of the CUDA kernels is not tested, and the last lines of the run say so. `make CUDA_CODE=,cuda_code`
# makes a missing nvcc a failure.
CUDA_CODE ?= $(shell PATH="$$PATH:$$CUDA_HOME/bin:/usr/local/cuda/bin"; command -v nvcc >/dev/null && echo ,cuda_code)
test-machine-code:
	FLOWSEG_REQUIRE_PROOFS=triton_code$(CUDA_CODE) OMP_NUM_THREADS=1 $(RUN) -m pytest tests/flowseg_kernels/static tests/test_last.py

# Longer checks, which are not part of `make test`; CONTRIBUTING.md says how long they take.
fuzz: install
	for backend in reference cpu cuda triton; do OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --backend $$backend --cases 20000 || exit 1; done

sanitize: install
	$(RUN) -m tests.sanitize all

coverage: install
	$(RUN) -m tests.coverage

mutation: install
	$(RUN) -m tests.mutation

# Downloads other versions of torch, 3 GB each.
versions: install
	$(RUN) -m tests.versions

# Build the site in build/docs. Warnings, such as a broken link, are errors.
docs: install
	$(RUN) -m sphinx -b html -E -W --keep-going -q docs build/docs

# Draw the pictures of docs/method.md with our ops.
figures: install
	$(RUN) -m docs.figures

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Time our kernels and their peers; needs an idle machine and about 20 minutes. Each part is stored and rendered as it ends. An
# interrupted run continues where it stopped.
bench: $(VENV)/.bench
	$(RUN) -m bench run

# Fail if our kernels became slower than the stored results of this machine, if none are stored, or if an entry vanished.
bench-compare: $(VENV)/.bench
	$(RUN) -m bench run -k ours --again --progress build/bench-compare
	$(RUN) -m bench compare build/bench-compare/*.json

# Run on a machine with a GPU, in .venv if it exists, else with PYTHON. Installs and downloads nothing; see docs/guides/gpu.md.
gpu-report:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m bench gpu

$(VENV)/.bench: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info flowseg_kernels/lib/*.so flowseg_kernels/lib/*.json
