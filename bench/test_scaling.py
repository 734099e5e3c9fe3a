"""Time against classes, code channels and pixels."""

import pytest

from .cases.availability import skip_unless_it_runs
from .cases.correction import assert_corrects, correction_cost, correction_entry
from .cases.decoding import assert_finds, search_entry
from .cases.workloads import Workload, with_converted_inputs
from .settings import DEVICE, OURS, QUICK, SIZE

CLASSES = (2, 16, 150) if QUICK else (2, 16, 150, 1000, 8192, 65536)
CHANNELS = (3, 4, 8, 16)
SIDES = (8, 32) if QUICK else (64, 128, 256, 512, 1024)
#: Side of the image of the series over classes and channels: brute force over 65,536 classes takes seconds on larger images.
SIDE = SIZE if QUICK or DEVICE == "cuda" else 128


@pytest.fixture(scope="module")
def grown():
    """grown(...): a Workload. Only the last one is kept, because workloads are large."""
    kept = {}

    def get(name, classes, **options):
        if name not in kept:
            kept.clear()
            # More codes lie closer together; scale the spread with their distance.
            factor = (150 / classes) ** (1 / options.get("channels", 3)) if classes > 150 else 1.0
            kept[name] = with_converted_inputs(Workload(name, classes, 0.1, spread_factor=factor, batch=1, **options))
        return kept[name]

    return get


def time_correction(measure, work, op, entry, **info):
    run = correction_entry(entry, work)
    assert_corrects(run, entry, work)
    measure(run, work, op, entry, **info, **(correction_cost(work) if entry in OURS else {}))


def time_search(measure, work, op, entry, **info):
    run = search_entry(entry, work)
    wrong = assert_finds(run, entry, work)
    moved = work.pixels * (4 * work.channels + work.label_dtype.itemsize) if entry in OURS else 0
    measure(run, work, op, entry, moved=moved, wrong_pixels=wrong, **info)


@pytest.mark.parametrize("entry", [*OURS, "eager", "KeOps"])
@pytest.mark.parametrize("classes", CLASSES)
def test_correction_by_classes(grown, measure, classes, entry):
    skip_unless_it_runs(entry, "distance_correction")
    if entry == "eager" and classes > 1000:
        pytest.skip("plain PyTorch would take several GB")
    work = grown(f"K={classes}", classes, size=SIDE)
    time_correction(
        measure, work, "distance_correction by classes", entry, x=classes, rounds=3 if classes > 8192 else None
    )


@pytest.mark.parametrize("entry", [*OURS, "faiss IndexFlatL2", "scipy cKDTree", "cdist+argmin"])
@pytest.mark.parametrize("classes", CLASSES)
def test_search_by_classes(grown, measure, classes, entry):
    skip_unless_it_runs(entry, "nearest_centroid")
    if entry == "cdist+argmin" and classes > 8192:
        pytest.skip("plain PyTorch would take several GB")
    work = grown(f"K={classes}", classes, size=SIDE)
    time_search(measure, work, "nearest_centroid by classes", entry, x=classes)


@pytest.mark.parametrize("entry", [*OURS, "eager", "KeOps"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_correction_by_channels(grown, measure, channels, entry):
    skip_unless_it_runs(entry, "distance_correction")
    work = grown(f"C={channels}", 150, channels=channels, size=SIDE)
    time_correction(measure, work, "distance_correction by channels", entry, x=channels)


@pytest.mark.parametrize("entry", [*OURS, "faiss IndexFlatL2", "cdist+argmin"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_search_by_channels(grown, measure, channels, entry):
    skip_unless_it_runs(entry, "nearest_centroid")
    work = grown(f"C={channels}", 150, channels=channels, size=SIDE)
    time_search(measure, work, "nearest_centroid by channels", entry, x=channels)


@pytest.mark.parametrize("entry", [*OURS, "KeOps"])
@pytest.mark.parametrize("side", SIDES)
def test_correction_by_pixels(grown, measure, side, entry):
    skip_unless_it_runs(entry, "distance_correction")
    work = grown(f"side={side}", 150, size=side)
    time_correction(measure, work, "distance_correction by pixels", entry, x=side * side)


@pytest.mark.parametrize("entry", [*OURS, "faiss IndexFlatL2"])
@pytest.mark.parametrize("side", SIDES)
def test_search_by_pixels(grown, measure, side, entry):
    skip_unless_it_runs(entry, "nearest_centroid")
    work = grown(f"side={side}", 150, size=side)
    time_search(measure, work, "nearest_centroid by pixels", entry, x=side * side)
