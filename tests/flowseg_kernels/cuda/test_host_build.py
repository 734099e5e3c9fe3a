"""The host build of Hopper's asynchronous copies and products reports what would be wrong on a GPU, and uses the GPU's layouts."""

import importlib.util
import itertools
import os
import pathlib
import subprocess

import pytest

from ...conftest import proof
from ...host_cuda import kernels as host_kernels
from ..static import sass
from .test_sanitizers import OPTIONS

#: What tests/host_cuda/checks.cpp must report, by check.
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
    "edges": "right",
    "sixteen columns": "right",
    "squares": "right",
    "pairs": "right",
}

#: What a run of tests/host_cuda/pipeline.cpp must say, by planted fault.
FAULTS = {
    "swizzle": "wanted",
    "proxy_fence": "without fence_async()",
    "early_load": "changed between a product and its wait",
    "transposed": "wanted",
    "wait_group": "got nan",
}

#: CuTe's layouts of wgmma's operands, as it prints them: shape, stride in elements, and whether 128-byte swizzle follows.
#: A and D: index m + 64 k (or n) of each (thread, element). K and MN: index in a tile of each (index along M or N, index along K).
CUTE = {
    "A": (((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)), False),
    "D": (((4, 8, 4), (2, 2, 8)), ((128, 1, 16), (64, 8, 512)), False),
    "D16": (((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)), False),
    "K": (((8, 8), (64, 1)), ((64, 512), (1, 0)), True),
    "MN": (((64, 1), (8, 8)), ((1, 0), (64, 512)), True),
}


def _output(name, *words, flags=("-O1",)):
    program = host_kernels.compiled(f"{name}{''.join(flags)}", *flags, sources=(f"{name}.cpp",))
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=120)


def test_faults_are_reported_and_right_kernels_are_not(kernels):
    lines = _output("checks").stdout
    for name, (name_after, want) in zip(REPORTS, [*itertools.pairwise(REPORTS), ("", "")], strict=True):
        part = lines.partition(f"{name}: ")[2].partition(f"\n{want}: " if want else "\n\n")[0]
        assert name_after in ("", name) and REPORTS[name] in part, f"{name}: {part}"


def test_a_kernel_with_stages_is_right(kernels):
    done = _output("pipeline", flags=("-O1", "-DFLOWSEG_PLANTS"))
    assert done.returncode == 0 and "every product was right" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_it_is_found(kernels, fault):
    done = _output("pipeline", fault, flags=("-O1", "-DFLOWSEG_PLANTS"))
    assert done.returncode == 1, done.stdout + done.stderr
    found = FAULTS[fault]
    assert found in done.stdout or fault == "transposed" and "changed between a product" in done.stdout, done.stdout
