"""How decode_confusion is launched on an H100: blocks, threads and shared memory, from the launch code itself."""

import ctypes

import pytest

from ...conftest import proof
from ...host_cuda import kernels as host_kernels

#: Multiprocessors, threads of one at 64 registers each, and bytes of shared memory of a block and of a multiprocessor.
H100 = (ctypes.c_int64 * 4)(132, 1024, 227 * 1024, 228 * 1024)
GRID_THREADS, THREADS = 512, 128  # kGridThreads and kThreads of csrc/cuda/block.cuh
SIZES = [(1, 512), (2, 512), (4, 512), (16, 512), (32, 512), (1, 1024), (4, 1024), (16, 256), (64, 128)]


@pytest.fixture(scope="module", params=[GRID_THREADS, THREADS], ids=["grid", "search"])
def plan(request):
    """(threads per block, function that returns blocks, threads, shared bytes and whether the counts are in them)."""
    proof("emulated", host_kernels.why_not())
    flags = ["-O0", "-fPIC", "-shared", "-DFLOWSEG_ONLY_FP32_C3", f"-DFLOWSEG_THREADS={request.param}"]
    library = ctypes.CDLL(host_kernels.compiled(f"libplan-{request.param}.so", *flags, sources=("plan.cpp",)))

    def run(classes, batch=16, side=512):
        found = (ctypes.c_int64 * 4)()
        sizes = map(ctypes.c_int64, (batch, side * side, classes, request.param == GRID_THREADS))
        library.plan_confusion(ctypes.byref(H100), *sizes, ctypes.byref(found))
        return tuple(found)

    return request.param, run


@pytest.mark.parametrize("classes", [19, 150, 171, 256, 330, 1000])
def test_the_launch_fills_the_gpu(plan, classes):
    """95 % of the multiprocessors have a block. A fifth of all threads or more run from the start if there is a grid."""
    for batch, side in SIZES:
        blocks, threads, *_ = plan[1](classes, batch, side)
        assert blocks >= 0.95 * H100[0], (batch, side)
        assert threads == plan[0] and (threads == THREADS or blocks * threads >= 0.2 * 2048 * H100[0]), (batch, side)


def test_counts_stay_in_shared_memory_as_long_as_they_fit(plan):
    threads, run = plan
    last = 336 if threads == GRID_THREADS else 328  # a search has codes in 16 KiB of static shared memory
    for classes in (150, 171, 256, last):
        _, _, shared, counted = run(classes)
        assert counted and 2 * classes**2 <= shared <= H100[2]
    assert not run(last + 1)[3]
