"""The last layer of a network at up to 65,536 classes: a head of K scores with cross-entropy against codes with flow_loss.

One image of 512 x 512 pixels with 64 features per pixel, and squares of 32 pixels of one class. A training step is the layer, the
loss and all gradients; decoding is the layer and the class of each pixel.
"""

import pytest

from .cases.availability import skip_unless_it_runs
from .cases.vocabulary import (
    CLASSES,
    ENTRIES,
    Vocabulary,
    assert_decodes,
    assert_trains,
    decoding,
    free_bytes,
    training_step,
    why_too_large,
)
from .settings import DEVICE, QUICK

#: Classes from which a CPU times a call once or thrice only, because one takes seconds.
MANY, MOST = 10_000, 65_536


@pytest.fixture(scope="module")
def vocabularies():
    """vocabularies(classes): a Vocabulary. Only the last one is kept, because vocabularies are large."""
    kept = {}

    def get(classes):
        if classes not in kept:
            kept.clear()
            kept[classes] = Vocabulary(classes)
        return kept[classes]

    return get


def rounds_of(entry, classes):
    if DEVICE == "cuda" or classes < MANY:
        return None
    return 1 if "chunks" in entry and classes >= MOST else 3


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("what", ["training", "decoding"])
@pytest.mark.parametrize("classes", CLASSES)
def test_vocabulary(vocabularies, measure, classes, what, entry):
    skip_unless_it_runs(entry, "flow_loss" if what == "training" else "nearest_centroid")
    if QUICK and classes > 3000 and not entry.startswith("ours"):
        pytest.skip("the short form leaves out scores of many classes")
    work = vocabularies(classes)
    reason = why_too_large(what, entry, classes, work.pixels, free_bytes())
    if reason:
        pytest.skip(reason)
    info = {}
    if what == "training":
        run = training_step(entry, work)
        assert_trains(run, entry, work)
    else:
        run = decoding(entry, work)
        info["wrong_pixels"] = wrong = assert_decodes(run, entry, work)
        # Rounding of products in bf16 changes the largest of close scores.
        assert wrong == 0 or "bf16" in entry
    # The time without a CUDA graph: a call takes milliseconds, far longer than its launches.
    measure(
        run, work, f"vocabulary {what}", entry, rounds=rounds_of(entry, classes), graph=False, classes=classes, **info
    )
