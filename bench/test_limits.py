"""The limits of this machine."""

import pytest

from . import machine
from .measure import pairs_per_second
from .settings import DEVICE, THROUGHPUT_ROUNDS

#: Stored results have these names; `multiply` and `pairs` are rates of throughput.cpp.
UNITS = {
    "copy": "GB/s copied",
    "multiply": "GFLOP/s of the multiply pipes",
    "pairs": "G pixels and classes/s of the correction's bare arithmetic at C = 3",
    "fp32": "GFLOP/s of fp32 matrix products",
    "bf16": "GFLOP/s of bf16 matrix products",
}


def record(benchmark, entry, rate):
    benchmark.group = "machine limits"
    benchmark.extra_info.update(op="machine", workload="", spread=0.0, entry=entry, pixels=0, rate=rate)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("name", UNITS)
def test_limit(benchmark, limits, name):
    rate = pairs_per_second(3) if name == "pairs" else limits[name]
    if rate is None:
        pytest.skip("needs a CPU and a C++ compiler")
    record(benchmark, UNITS[name], rate / 1e9)


@pytest.mark.skipif(DEVICE == "cuda", reason="a limit of CPU threads")
def test_threads_of_the_multiply_pipes(benchmark, limits):
    """Close to the number of threads if each thread has its own core; close to 1 if all share one core."""
    alone = machine.multiply_adds_per_second(1, THROUGHPUT_ROUNDS)
    if alone is None:
        pytest.skip("no C++ compiler")
    record(benchmark, "times one thread's multiply pipes on all threads", limits["multiply"] / 2 / alone)
