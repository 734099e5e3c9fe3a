"""Backend choice, loading of compiled libraries, and `info`."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import flowseg_kernels as fk
from bench import preferences
from flowseg_kernels.info import _choices, report
from flowseg_kernels.runtime import extension, registry
from flowseg_kernels.runtime.backend import backend_reasons, gpu_preference, select

from ..support.samples import image_batch

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python(*arguments, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_unknown_and_missing_backends_are_named(codes150):
    with pytest.raises(ValueError, match="backend: wanted one of cpu, cuda, reference, triton; got 'gpu'"):
        with fk.use_backend("gpu"):
            pass
    x, source, labels, t = image_batch(codes150.centroids)
    with fk.use_backend("cuda"), pytest.raises(fk.BackendUnavailable, match="flow_loss: backend 'cuda' was asked for"):
        fk.flow_loss(x, source, labels, t, codes150)
    with pytest.raises(ValueError, match="op: wanted one of"):
        fk.available_backends("nothing")


def test_blocks_nest_and_end(codes150):
    from flowseg_kernels.runtime.backend import requested_backend

    with fk.use_backend("reference"):
        with fk.use_backend("cpu"):
            assert requested_backend() == "cpu"
        assert requested_backend() == "reference"
    assert requested_backend() == ""


def test_every_op_has_a_reference():
    from flowseg_kernels.runtime.backend import OPS

    for op in OPS:
        assert fk.available_backends(op)[-1] == "reference"
        assert "reference" in fk.available_backends(op, "cuda")


@pytest.fixture(scope="module")
def without_extension():
    """A process without the compiled libraries that uses ops, then prints the backends of flow_loss, then runs `info`."""
    code = (
        "import runpy, torch, flowseg_kernels as fk; book = fk.Codebook(fk.kronecker_centroids(5)); "
        "labels = torch.randint(0, 5, (1, 4, 4)); assert torch.equal(book.decode(book.encode(labels)), labels); "
        "print(fk.available_backends('flow_loss')); runpy.run_module('flowseg_kernels.info', run_name='__main__')"
    )
    done = python("-c", code, FLOWSEG_DISABLE_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_extension_everything_still_runs(without_extension):
    assert without_extension.splitlines()[0] == "['reference']"


def test_process_default_backend_is_read_and_checked():
    code = "import flowseg_kernels.runtime.backend as b; print(b.requested_backend())"
    assert python("-c", code, FLOWSEG_BACKEND="reference").stdout.strip() == "reference"
    assert "backend: wanted one of" in python("-c", code, FLOWSEG_BACKEND="gpu").stderr


def test_info_names_every_op_and_the_reasons(without_extension):
    for op in ("flow_loss", "nearest_centroid", "neural_field"):
        assert op in without_extension
    assert "not cpu: FLOWSEG_DISABLE_EXTENSION=1 is set" in without_extension
    assert torch.__version__ in without_extension
    assert without_extension.count("Triton kernels take CUDA tensors, these are on cpu") == 1


def test_info_says_why_a_gpu_would_choose_a_backend():
    """For every op with both GPU backends, with or without a GPU here. An op that no GPU has measured says so."""
    _, _, reasons = report().partition("Order on a GPU, and why:\n")
    for op in preferences.OPS:
        order, because = gpu_preference(op)
        (line,) = [line for line in reasons.splitlines() if op in line.partition(":")[0]]
        assert line.endswith(f": {' before '.join(order)}; {because}")
        assert preferences.measured(op, sorted(preferences.RESULTS.glob("*"))) or "no GPU has measured it" in line


def test_load_failures_are_readable(tmp_path):
    library = dataclasses.replace(extension.CPU, path=tmp_path / "libflowseg_cpu.so")
    assert "were not compiled" in library.load()
    library.path.write_bytes(b"not a library")
    reason = library.load()
    assert "is truncated or is not an ELF shared library" in reason and "rebuild it with" in reason
    library.path.with_suffix(".json").write_text('{"torch_target": "99.0"}')
    assert "needs torch 99.0 or newer" in library.load()


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_passes_the_op_tests(isa):
    """Run the ops' tests again in a new process on the code of each instruction set."""
    if extension.why_no_cpu_kernels():
        pytest.skip(extension.why_no_cpu_kernels())
    best = INSTRUCTION_SETS[torch.ops.flowseg_cpu.instruction_set()]
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this CPU runs {best} code at most")
    # The main run tests the best instruction set already. Only its field may have run with bf16 instructions instead.
    tests = "tests/flowseg_kernels/ops" + ("/test_neural_field.py" if isa == best else "")
    code = (
        "import sys, pytest, torch, flowseg_kernels as fk; fk.available_backends('flow_loss'); "
        "assert torch.ops.flowseg_cpu.instruction_set() == int(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
    )
    done = python(
        "-c", code, str(INSTRUCTION_SETS.index(isa)), tests, "-q", "-x", "-p", "no:cacheprovider",
        "-k", "cpu and not ten_million and not fp32_error and not 1000 and not 3000 and not many_classes "
        "and not compile and not second and not torchmetrics",
        FLOWSEG_CPU_ISA=isa,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize(
    "built, gpu, runs",
    [
        ("sm_90", (9, 0), True), ("sm_80", (8, 9), True), ("sm_90", (8, 0), False), ("sm_90", (10, 0), False),
        ("sm_80, compute_90", (12, 0), True), ("compute_90", (8, 6), False), ("sm_100, sm_120", (12, 0), True),
    ],
)  # fmt: skip
def test_cuda_kernels_compiled_for_another_gpu_are_not_chosen(built, gpu, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    reason = extension._why_not_this_gpu(built)
    assert reason is None if runs else f"this GPU is sm_{gpu[0]}{gpu[1]}" in reason and "TORCH_CUDA_ARCH_LIST" in reason


@pytest.mark.parametrize(
    "gpus, left_out, words",
    [
        ([(9, 0)], {}, None),
        ([], {}, None),
        ([(8, 0), (9, 0)], {}, None),
        (
            [(8, 0)],
            {},
            "the CUDA kernels of neural_field need a GPU of compute capability 9.0 (Hopper); this one has 8.0",
        ),
        ([(10, 0)], {"neural_field": "old nvcc"}, "need a GPU of compute capability 9.0 (Hopper); this one has 10.0"),
        (
            [(9, 0)],
            {"neural_field": "old nvcc"},
            "of neural_field were left out of the library (old nvcc); compile them",
        ),
        ([], {"neural_field": "old nvcc"}, "left out of the library (old nvcc)"),
        ([(9, 0)], {"another": "old nvcc"}, None),
    ],
)
def test_the_reason_against_kernels_for_hopper_alone(gpus, left_out, words, monkeypatch, tmp_path):
    """It is a reason against the field only: the other CUDA kernels of the same library run."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[device])
    library = dataclasses.replace(extension.CUDA, path=tmp_path / "libflowseg_cuda.so")
    library.path.with_suffix(".json").write_text(json.dumps({"left_out": left_out}))
    monkeypatch.setattr(extension, "CUDA", library)
    monkeypatch.setattr(registry, "why_no_cuda_kernels", lambda: None)
    monkeypatch.setattr(registry, "why_no_triton", lambda device: None)
    monkeypatch.setattr("flowseg_kernels.runtime.backend._stored_preferences", dict)  # the order of BACKENDS
    extension.why_no_hopper_kernels.cache_clear()
    try:
        reasons = [backend_reasons(op, "cuda")["cuda"] for op in ("flow_loss", "neural_field", "neural_field_bwd")]
        assert reasons[0] is None and reasons[1] == reasons[2]
        assert reasons[1] is None if words is None else words in reasons[1]
        if words:
            with fk.use_backend("cuda"), pytest.raises(fk.BackendUnavailable) as error:
                select("neural_field", "cuda", 3, "cuda")
            assert words in str(error.value)
        _, field, *against = _choices(["flow_loss", "neural_field"], "cuda")
        taken = "cuda for bf16 or fp16 tensors, Hx a multiple of 8 up to 128; triton for other calls"
        assert field == f"  neural_field         {'triton' if words else taken}"
        assert taken.removeprefix("cuda ") in (ROOT / "docs/ops/neural_field.md").read_text()
        assert words is None or any(line.startswith("  not cuda: ") and words in line for line in against)
    finally:
        extension.why_no_hopper_kernels.cache_clear()


def test_a_library_without_the_ops_that_its_build_left_out_is_no_other_version(tmp_path):
    library = dataclasses.replace(extension.CUDA, path=tmp_path / "libflowseg_cuda.so")
    every = library._ops_without_kernel()
    assert {"flowseg_cuda::neural_field", "flowseg_cuda::neural_field_bwd", "flowseg_cuda::flow_loss"} <= set(every)
    library.path.with_suffix(".json").write_text('{"left_out": {"neural_field": "old nvcc"}}')
    assert library._ops_without_kernel() == [name for name in every if "neural_field" not in name]


@pytest.mark.parametrize(
    "runtime, driver, runs",
    [
        ("13.0", (13, 0), True), ("13.1", (13, 0), True), ("13.0", (12, 9), False), ("12.6", (13, 1), True),
        ("13.0", None, True), ("", (12, 9), True),
    ],
)  # fmt: skip
def test_a_driver_older_than_the_linked_runtime_is_named(runtime, driver, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "_driver_version", lambda: driver)
    reason = extension._why_not_this_driver(runtime)
    assert reason is None if runs else "CUDA 13.0" in reason and "driver is for CUDA 12.9" in reason


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ was not found")
@pytest.mark.parametrize("answer, version", [("*v = 12080; return 0;", (12, 8)), ("*v = 0; return 100;", None)])
def test_the_driver_is_asked_for_its_version(answer, version, tmp_path):
    driver = tmp_path / "libcuda.so.1"
    code = f'extern "C" int cuDriverGetVersion(int* v) {{ {answer} }}'
    subprocess.run(["g++", "-x", "c++", "-shared", "-fPIC", "-", "-o", driver], input=code, text=True, check=True)
    assert extension._driver_version(str(driver)) == version
    assert extension._driver_version(str(tmp_path / "none.so")) is None


def test_the_import_touches_neither_driver_nor_device_and_loads_no_compiler():
    script = """
import ctypes, sys, torch
before = set(sys.modules)
def refused(*_, **__): raise AssertionError("asked at import")
for name in ("is_available", "device_count", "get_device_capability", "current_device", "init"):
    setattr(torch.cuda, name, refused)
asked, load = [], ctypes.CDLL
ctypes.CDLL = lambda name, *a, **k: (asked.append(str(name)), load(name, *a, **k))[1]
import flowseg_kernels
assert not [name for name in asked if "libcuda" in name], asked
assert not {"torch._dynamo", "triton"} & (set(sys.modules) - before)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


def test_calls_without_a_gradient_leave_out_the_autograd_rule(codes150):
    """PyTorch's wrapper of an op with a backward rule costs 7 to 12 us per call, even if no tensor needs a gradient."""
    _, source, labels, t = image_batch(codes150.centroids)
    x = source.clone().requires_grad_()

    def every_op(x):
        fk.flow_interpolate(source, labels, t, codes150)
        fk.flow_loss(x, source, labels, t, codes150)
        fk.distance_correction(x, labels, codes150)
        fk.nearest_centroid(x, codes150)
        fk.decode_confusion(x, labels, codes150)

    files = set()
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    try:
        every_op(source)
        with torch.no_grad():
            every_op(x)
    finally:
        sys.setprofile(None)
    assert not [name for name in files if name.endswith("torch/_library/autograd.py")]


def test_triton_kernels_get_codes_on_wide_boundaries():
    from flowseg_kernels.runtime.triton import aligned

    store = torch.arange(41.0)
    for codes in (store[1:].view(10, 4), store[:40].view(10, 4), store[:40].view(4, 10).T):
        found = aligned(codes)
        assert found.data_ptr() % 16 == 0 and found.is_contiguous() and torch.equal(found, codes)
