"""The host build of Hopper's asynchronous copies and products reports what would be wrong on a GPU, and uses the GPU's layouts."""

import importlib.util
import itertools
import os
import pathlib
import subprocess

import pytest

from ...host_cuda import kernels as host_kernels
from ..static import sass
from .test_sanitizers import OPTIONS

#: The reports of tests/host_cuda/checks.cpp, by check: each contains this text.
REPORTS = {
    "lost arrival": "barrier at byte 32768 of shared memory, phase 0: 1 of 2 arrivals and 0 bytes are missing",
    "extra arrival": "one arrival too many",
    "missing bytes": "0 of 1 arrivals and 8192 bytes are missing",
    "missing thread": "threads 0-4, 6-127: named barrier 3: 127 of 128 threads have come",
    "load without wait": "the block ended before a load to byte 0 had landed",
    "load without init fence": "without fence_barrier_init()",
    "two loads to one place": "where another load has not yet landed",
    "write under a load": "a thread wrote to byte 100 of shared memory before a load to it had landed",
    "store without fence": "a store reads byte 0 of shared memory, which was written without fence_async()",
    "store without wait": "thread 0 ended before its stores had read shared memory",
    "load of a store under way": "a load reads global memory that thread 0 has stored, before that thread's wait_for_copies()",
    "load of a store without fence": "a load reads global memory that thread 0 has stored",
    "staging reused": "overwritten before the thread had waited for the reads of a store",
    "misplaced tile": "a tile at byte 512 of shared memory, not a multiple of 1024",
    "past the end": "is outside of the shared memory",
    "product without fence": "without wgmma_fence()",
    "off the grid": "an operand whose rows are K starts at byte 32",
    "other stride": "a descriptor with other strides, swizzle or offset",
    "sums written": "an accumulator was written between a product and its wait",
    "sums written before adding": "written since its last wgmma_fence()",
    "product without wait": "ended before its products",
    "lanes disagree": "threads of warp group 0 issue different products",
    "many registers": "the warps take 92160 registers",
    "late load": "right",
    "load of a store": "right",
    "edges": "right",
    "16 columns": "right",
    "32 columns": "right",
    "32 columns, both in tiles": "right",
    "squares": "right",
    "pairs": "right",
}

#: The output of tests/host_cuda/pipeline.cpp by planted fault: it contains one of these texts.
FAULTS = {
    "swizzle": ("wanted",),
    "proxy_fence": ("without fence_async()",),
    "early_load": ("changed between a product and its wait",),
    "transposed": ("wanted", "changed between a product and its wait"),
    "wait_group": ("got nan",),
}

#: CuTe's layouts of wgmma's operands, as it prints them: shape, stride in elements, and whether 128-byte swizzle follows.
#: A and D: index m + 64 k (or n) of each (thread, element). K and MN: index in a tile of each (index along M or N, index along K).
CUTE = {
    "A": (((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)), False),
    "D": (((4, 8, 4), (2, 2, 8)), ((128, 1, 16), (64, 8, 512)), False),
    "D16": (((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)), False),
    "D32": (((4, 8, 4), (2, 2, 4)), ((128, 1, 16), (64, 8, 512)), False),
    "K": (((8, 8), (64, 1)), ((64, 512), (1, 0)), True),
    "MN": (((64, 1), (8, 8)), ((1, 0), (64, 512)), True),
}


SETS_OF_FLAGS = {"fibers": (), "thread": ("-g1", "-fsanitize=thread"), "address": ("-g1", "-fsanitize=address")}


def _output(name, *words, flags=()):
    """Run a program of tests/host_cuda, compiled with `flags`."""
    program = host_kernels.compiled(
        "".join([name, *flags]), "-O1", "-DFLOWSEG_PLANTS", *flags, sources=(f"{name}.cpp",)
    )
    command = ["setarch", "-R", program, *words]  # see test_sanitizers.py
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPTIONS}, timeout=120)


@pytest.fixture(scope="module")
def reported(kernels):
    return dict(line.split(": ", 1) for line in _output("checks").stdout.splitlines())


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_wrong_is_reported_and_what_is_right_is_not(reported, name):
    assert REPORTS[name] in reported[name]


@pytest.mark.parametrize("threads", SETS_OF_FLAGS)
def test_a_kernel_with_stages_is_right(kernels, threads):
    done = _output("pipeline", flags=SETS_OF_FLAGS[threads])
    assert done.returncode == 0 and "every product was right" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_it_is_found(kernels, fault):
    done = _output("pipeline", fault)
    assert done.returncode == 1 and any(text in done.stdout for text in FAULTS[fault]), done.stdout + done.stderr


def test_thread_sanitizer_finds_a_stage_that_is_loaded_too_early(kernels):
    done = _output("pipeline", "early_load", flags=SETS_OF_FLAGS["thread"])
    assert done.returncode == 66 and "data race" in done.stderr, done.stdout + done.stderr[-3000:]


def _indices(text):
    """The lists of indices in the output of layouts.cpp or cute_layouts.cpp, by name."""
    found = {}
    for line in text.splitlines():
        name, *numbers = line.split()
        found.setdefault(name, []).append([int(n) for n in numbers])
    return found


def _index_list(shape, stride, swizzled):
    """The indices of a CuTe layout, the first mode fastest."""
    sizes, steps = itertools.chain(*shape), itertools.chain(*stride)
    indices = [0]
    for size, step in zip(sizes, steps, strict=True):
        indices = [i + step * n for n in range(size) for i in indices]
    # Swizzle<3,4,3> of bytes, in elements of 2 bytes: the chunk of 8 elements is changed by the row of 64.
    return [i ^ (i >> 6 & 7) << 3 for i in indices] if swizzled else indices


def test_layouts_are_those_of_cute(kernels):
    ours = _indices(_output("layouts").stdout)
    assert ours.keys() == CUTE.keys()
    for name, layout in CUTE.items():
        assert all(indices == _index_list(*layout) for indices in ours[name]), name


def _cuda_headers():
    """Folders that may have CUDA's headers."""
    nvcc = sass.find_tool("nvcc")
    roots = [pathlib.Path(root) for v in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(v))]
    roots += [pathlib.Path(nvcc).resolve().parents[1]] if nvcc else []
    return [root / "include" for root in [*roots, pathlib.Path("/usr/local/cuda")]]


def test_the_stored_layouts_are_still_those_of_cute(tmp_path):
    """`pip install --no-deps --target DIR nvidia-cutlass==4.2.0.0`, then run this test with PYTHONPATH=DIR."""
    wheel = importlib.util.find_spec("cutlass_library")
    headers = next((h for h in _cuda_headers() if (h / "cuda_runtime_api.h").exists()), None)
    if not wheel or not headers:
        pytest.skip("nvidia-cutlass or CUDA's headers were not found")
    folders = [pathlib.Path(wheel.origin).parent / "source" / "include", headers, headers / "cccl"]
    command = ["g++", "-std=c++17", "-w", *(f"-I{f}" for f in folders), host_kernels.FOLDER / "cute_layouts.cpp"]
    subprocess.run([*command, "-o", tmp_path / "cute"], check=True)
    found = _indices(subprocess.run([tmp_path / "cute"], capture_output=True, text=True, check=True).stdout)
    assert found == {name: [_index_list(*layout)] for name, layout in CUTE.items()}
