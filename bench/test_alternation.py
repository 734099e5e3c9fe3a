"""Pairs of calls timed alternately; the result is the median of the ratios.

Other guests of the host slow it for seconds. Medians of two entries timed one after the other differ by up to a third for the same
code; neighbouring calls differ little. So targets that are ratios of two of our calls are measured here.
"""

import itertools
import statistics
import time

import pytest
import torch

import flowseg_kernels as fk

from .cases.correction import assert_corrects, correction_entry
from .cases.decoding import assert_counts, assert_finds, search_entry
from .cases.field import Field, assert_agrees, field_call
from .cases.workloads import CHANNELS_CLASSES, CHANNELS_MAPS, Workload, channels_workload, with_converted_inputs
from .settings import DEVICE, QUICK

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="no GPU target is a ratio of two of our calls")
PATCHES = 4 if QUICK else 256


def rotating(run, work):
    sets = itertools.cycle(work.sets)
    return lambda: run(next(sets))


def search(work, entry="ours"):
    run = search_entry(entry, work)
    assert_finds(run, entry, work)
    return rotating(run, work)


def many_against_few(spread, workloads):
    return search(workloads("many", spread)), search(workloads("ade512", spread))


def more_classes(channels, kind, workloads):
    return tuple(search(channels_workload(channels, classes, kind)) for classes in (1000, 150))


def margin(classes, workloads):
    """Decoding in three channels with the margin, and without."""
    # The grid of 20,000 codes takes seconds to build.
    few = min(classes, 1000) if QUICK else classes
    factor = (150 / few) ** (1 / 3)
    work = Workload(f"C=3 K={classes}", few, 0.1, spread_factor=factor, batch=1)

    def run(i):
        return fk.nearest_centroid(i["x"], work.codebook, out_dtype=work.label_dtype, return_margin=True)[0]

    assert_finds(run, "ours", work)
    return rotating(run, work), search(work)


def bf16_search(spread, workloads):
    work = workloads("ade512", spread)
    return search(work, "ours bf16"), search(work)


def correction(work, entry):
    run = correction_entry(entry, work)
    assert_corrects(run, entry, work)
    return rotating(run, work)


def bf16_correction(workloads):
    work = with_converted_inputs(workloads("ade512"))
    return correction(work, "ours bf16"), correction(work, "ours")


def confusion(name, spread, workloads):
    work = workloads(name, spread)

    def run(i):
        return fk.decode_confusion(i["x"], i["labels"], work.codebook)

    assert_counts(run, "ours", work)
    return rotating(run, work), search(work)


def threads(op, workloads):
    if torch.get_num_threads() < 2:
        pytest.skip("needs 2 threads; this run has 1 (OMP_NUM_THREADS)")
    work = with_converted_inputs(workloads("ade512"))
    run = correction_entry("ours", work) if op == "distance_correction" else search_entry("ours", work)

    def on(count):
        def call(inputs):
            torch.set_num_threads(count)
            return run(inputs)

        return call

    one, two = on(1), on(2)
    assert torch.equal(one(work.sets[0]), two(work.sets[0]))
    return rotating(one, work), rotating(two, work)


def field(what, entry, dtype):
    work = Field("XL", PATCHES, dtype)
    run = field_call(entry, dtype, what)
    assert_agrees(run, work)
    return rotating(run, work)


def eager_field(what, workloads):
    return field(what, "eager", torch.float32), field(what, "ours", torch.float32)


def bf16_field(what, workloads):
    return field(what, "ours", torch.float32), field(what, "ours", torch.bfloat16)


SPREADS = (0.05, 0.1, 0.3)
#: name: a function that checks and returns both calls (dividend first), and its arguments before `workloads`. Points of "many" have
#: half the spread of the arguments, because its codes lie closer together.
PAIRS = {
    **{f"nearest_centroid spread {s}: K = 1000 against K = 150": (many_against_few, s) for s in SPREADS},
    **{
        f"nearest_centroid C = {channels} {kind}: K = 1000 against K = 150": (more_classes, channels, kind)
        for channels in (8, 16)
        for kind in CHANNELS_MAPS
    },
    **{f"nearest_centroid C = 3 K = {k}: with margin against without": (margin, k) for k in CHANNELS_CLASSES},
    **{f"nearest_centroid ade512 spread {s}: bf16 against fp32": (bf16_search, s) for s in SPREADS},
    "distance_correction ade512: bf16 against fp32": (bf16_correction,),
    "decode_confusion ade512 spread 0.1: against nearest_centroid": (confusion, "ade512", 0.1),
    "decode_confusion many spread 0.05: against nearest_centroid": (confusion, "many", 0.1),
    **{f"{op} ade512: 1 thread against 2": (threads, op) for op in ("distance_correction", "nearest_centroid")},
    **{
        f"neural_field {what} XL 256 patches {name}": (pair, what)
        for what in ("forward", "forward+backward")
        for name, pair in (("float32: eager against ours", eager_field), ("of ours: fp32 against bf16", bf16_field))
    },
}


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@pytest.mark.parametrize("name", PAIRS)
def test_one_against_the_other(benchmark, workloads, name):
    make, *of = PAIRS[name]
    before = torch.get_num_threads()
    try:
        over, under = make(*of, workloads)
        once = max(seconds(over) + seconds(under), 1e-6)
        rounds = 2 if QUICK else max(11, min(301, int(4 / once)))
        ratios = [seconds(over) / seconds(under) for _ in range(rounds)]
    finally:
        torch.set_num_threads(before)
    benchmark.group = "calls in alternation"
    benchmark.extra_info.update(op="alternation", workload="", spread=0.0, entry=name, pixels=0, rounds=rounds)
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    benchmark.pedantic(lambda: None, rounds=1)
