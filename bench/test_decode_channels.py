"""nearest_centroid in 8 and 16 channels at up to 20,000 classes against faiss, scipy's k-d tree and our own search of all codes."""

import pytest

from .cases.availability import skip_unless_it_runs
from .cases.decoding import assert_finds, search_entry
from .cases.workloads import CHANNELS_CLASSES, CHANNELS_MAPS, channels_workload
from .settings import DEVICE, OURS

MOST = max(CHANNELS_CLASSES)


@pytest.fixture(scope="module")
def many_channels():
    """many_channels(channels, classes, kind): a Workload. Only the last one is kept, because workloads are large."""
    kept = {}

    def get(*key):
        if key not in kept:
            kept.clear()
            kept[key] = channels_workload(*key)
        return kept[key]

    return get


@pytest.mark.parametrize("entry", [*OURS, "ours without grid", "faiss IndexFlatL2", "scipy cKDTree"])
@pytest.mark.parametrize("kind", CHANNELS_MAPS)
@pytest.mark.parametrize("classes", CHANNELS_CLASSES)
@pytest.mark.parametrize("channels", [8, 16])
def test_nearest_centroid_in_many_channels(many_channels, measure, channels, classes, kind, entry):
    skip_unless_it_runs(entry, "nearest_centroid")
    if entry == "scipy cKDTree" and classes < MOST:
        pytest.skip("faiss is faster among few classes")
    work = many_channels(channels, classes, kind)
    run = search_entry(entry, work)
    wrong = assert_finds(run, entry, work)
    moved = work.pixels * (4 * channels + work.label_dtype.itemsize) if entry.startswith("ours") else 0
    rounds = 3 if classes == MOST and entry not in OURS and DEVICE == "cpu" else None
    measure(run, work, "nearest_centroid", entry, rounds=rounds, spread=True, moved=moved, wrong_pixels=wrong)
