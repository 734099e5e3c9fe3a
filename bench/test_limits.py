"""The limits of the machine themselves."""

import pytest

from . import machine
from .conftest import DEVICE, PIPE_ROUNDS, pairs_a_second

UNITS = {
    "copy": "GB/s copied",
    "multiply": "GFLOP/s of the multiply pipes",
    "pairs": "G pixels and classes/s of the correction's bare arithmetic at C = 3",
    "fp32": "GFLOP/s of fp32 matrix products",
    "bf16": "GFLOP/s of bf16 matrix products",
}


def note(benchmark, entry, rate):
    benchmark.group = "machine limits"
    benchmark.extra_info.update(op="machine", workload="", spread=0.0, entry=entry, pixels=0, rate=rate)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("name", UNITS)
def test_limit(benchmark, limits, name):
    rate = pairs_a_second(3) if name == "pairs" else limits[name]
    if rate is None:
        pytest.skip("measured on a CPU with a C++ compiler only")
    note(benchmark, UNITS[name], rate / 1e9)


@pytest.mark.skipif(DEVICE == "cuda", reason="threads are a CPU's")
def test_threads_of_the_multiply_pipes(benchmark, limits):
    """Near the number of threads where each has a core of its own, near 1 where they share one."""
    alone = machine.multiply_adds(1, PIPE_ROUNDS)
    if alone is None:
        pytest.skip("no C++ compiler")
    note(benchmark, "times one thread's multiply pipes on all threads", limits["multiply"] / 2 / alone)
