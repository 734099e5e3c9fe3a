"""nearest_centroid against faiss, scipy's k-d tree, KeOps, torch.cdist and Pillow's inexact table; decode_confusion."""

import pytest

import flowseg_kernels as fk

from . import plain
from .cases.availability import skip_unless_it_runs
from .cases.decoding import ENTRIES, assert_counts, assert_finds, search_entry
from .cases.workloads import NAMES
from .settings import OURS


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("spread", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("workload", NAMES)
def test_nearest_centroid(workloads, measure, workload, entry, spread):
    skip_unless_it_runs(entry, "nearest_centroid")
    if entry == "Pillow quantize" and workload == "many":
        pytest.skip("a palette holds 256 colours")
    if workload in ("coco512", "ade512 random") and (entry not in OURS or (workload == "coco512" and spread != 0.3)):
        pytest.skip("the classes lie between ade512 and many")
    if entry == "cdist+argmin compiled" and (workload, spread) != ("ade512", 0.3):
        pytest.skip("the time does not depend on the spread, and compiling is slow")
    work = workloads(workload, spread)
    run = search_entry(entry, work)
    wrong = assert_finds(run, entry, work)
    moved = (
        work.pixels * (3 * (2 if "bf16" in entry else 4) + work.label_dtype.itemsize) if entry.startswith("ours") else 0
    )
    measure(run, work, "nearest_centroid", entry, spread=True, moved=moved, wrong_pixels=wrong)


@pytest.mark.parametrize("entry", [*OURS, "eager"])
@pytest.mark.parametrize("workload", NAMES)
def test_decode_confusion(workloads, measure, workload, entry):
    """Decode and count. The plain form decodes with cdist, which may misplace pixels near the border of two classes."""
    skip_unless_it_runs(entry, "decode_confusion")
    work = workloads(workload, 0.1)
    mu = work.codebook.centroids

    def run(i):
        if entry in OURS:
            return fk.decode_confusion(i["x"], i["labels"], work.codebook)
        return plain.confusion(i["x"], i["labels"].long(), mu)

    assert_counts(run, entry, work)
    moved = work.pixels * (12 + work.label_dtype.itemsize) if entry in OURS else 0
    measure(run, work, "decode_confusion", entry, spread=True, moved=moved)
