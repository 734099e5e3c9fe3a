"""The limits of the machine themselves, and how far a second thread goes."""

import pytest
import torch

import flowseg_kernels as fk

from .conftest import DEVICE


@pytest.mark.parametrize("name", ["copy", "fp32", "bf16"])
def test_limit(benchmark, limits, name):
    benchmark.group = "machine limits"
    unit = "GB/s copied" if name == "copy" else f"GFLOP/s of {name} matrix products"
    benchmark.extra_info.update(op="machine", workload="", entry=unit, pixels=0, rate=limits[name] / 1e9)
    benchmark.pedantic(lambda: None, rounds=1)


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
