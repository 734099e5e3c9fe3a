"""The limits of the machine themselves, and how far a second thread goes."""

import pytest
import torch

import flowseg_kernels as fk

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


@pytest.mark.skipif(DEVICE == "cuda", reason="threads are a CPU's")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", ["distance_correction", "nearest_centroid"])
def test_threads(workloads, measure, op, threads):
    if threads > torch.get_num_threads():
        pytest.skip(f"this run has {torch.get_num_threads()} thread(s)")
    work = workloads("ade512")
    run = {
        "distance_correction": lambda i: fk.distance_correction(i["x"], i["labels"], work.codebook),
        "nearest_centroid": lambda i: fk.nearest_centroid(i["x"], work.codebook, out_dtype=torch.uint8),
    }[op]
    before = torch.get_num_threads()
    alone = run(work.sets[0])
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(work.sets[0]), alone)
        measure(run, work, op, f"{threads} thread{'s' * (threads > 1)}", variant="threads")
    finally:
        torch.set_num_threads(before)
