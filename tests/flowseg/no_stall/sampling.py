"""Sampling and evaluation: no read-back before the result is asked for."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowseg.data import open_data
from flowseg.inference import evaluate as evaluation
from flowseg.inference.counts import ClassCounts, ConfusedPairs, PairCounts
from flowseg.inference.evaluate import evaluate
from tests.flowseg.support.random_networks import random_segmenter
from tests.support.pretend_device import WAITS, allowed, no_read_back


def segmenter_on(device, precision="no", **sections):
    sample = {"batch_size": 2, **sections.pop("sample", {})}
    return random_segmenter(device, sample=sample, train={"mixed_precision": precision}, **sections)


@pytest.mark.parametrize("predicts", ["velocity", "endpoint"])
@pytest.mark.parametrize(
    "source, method, precision",
    [
        ("image", "euler", "no"),
        ("image", "heun", "no"),
        ("image", "midpoint", "no"),
        ("noise", "euler", "no"),
        ("noise", "euler", "bf16"),
    ],
)
def test_sampling_does_not_read(device, source, method, precision, predicts):
    sections = {"flow": {"source": source, "predicts": predicts}, "codes": {"channels": 8 if source == "image" else 3}}
    sample = {"method": method, "steps": 3}
    segmenter = segmenter_on(device, precision, sample=sample, **sections)
    images = torch.rand(2, 3, 16, 24).to(device)
    first = segmenter.sample(images)
    with no_read_back():
        again, path = segmenter.sample(images, keep_path=True)
    assert torch.equal(again.cpu(), first.cpu()) and len(path) == 4
    assert len(torch.cat([x.cpu() for _, x in path]).unique()) > 100


def photographs(count=3, size=(40, 24)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


VIEWS = {
    "labels": {"upsample": "labels"},
    "codes": {"upsample": "codes"},
    "probabilities": {"upsample": "probabilities"},
    "mirrored and scaled": {"flip": True, "scales": [1.0, 1.5], "upsample": "probabilities"},
    "windows": {"window": "slide", "flip": True, "resize": "native"},
}


@pytest.mark.parametrize("name", VIEWS)
def test_labels_of_photographs_do_not_read(device, name):
    segmenter = segmenter_on(device, sample=VIEWS[name], data={"height": 16, "width": 24})
    native = (24, 40)

    def run():
        images = [segmenter.seen(image) for image in photographs()]
        batches = [[image] for image in images] if segmenter.several_views else [images]
        return [found for batch in batches for found in segmenter.native_labels(batch, native, with_margin=True)]

    first = run()
    with no_read_back():
        again = run()
    assert len(again) == 3
    for old, new in zip(first, again):
        assert new[0].shape == native and torch.equal(old[0].cpu(), new[0].cpu())


def test_evaluation_reads_its_counts_once_at_the_end(device, monkeypatch):
    segmenter = segmenter_on(device)
    pairs = open_data(segmenter.config.data).val
    expected = evaluate(segmenter, pairs)
    confusion, calls = PairCounts.confusion, []

    def final(counts):
        calls.append(counts)
        with allowed():
            return confusion(counts)

    monkeypatch.setattr(PairCounts, "confusion", final)
    with no_read_back():
        scores = evaluate(segmenter, pairs)
    assert len(calls) == 1 and scores.images == 6 and torch.equal(scores.confusion, expected.confusion)


def test_evaluation_of_many_classes_reads_its_counts_once_at_the_end(device, monkeypatch):
    segmenter = segmenter_on(device)
    pairs = open_data(segmenter.config.data).val
    monkeypatch.setattr(evaluation, "MOST_PAIRED", 1)
    expected = evaluate(segmenter, pairs)
    wrong = expected.most_confused(100)
    by_class, calls = ClassCounts.by_class, []

    def final(counts):
        calls.append(counts)
        with allowed():
            return by_class(counts)

    monkeypatch.setattr(ClassCounts, "by_class", final)
    # Several merges of the table of confused pairs in one evaluation.
    monkeypatch.setattr(ConfusedPairs.__init__, "__defaults__", (300,))
    with no_read_back():
        scores = evaluate(segmenter, pairs)
    assert len(calls) == 1 and torch.equal(scores.counts, expected.counts) and scores.confusion is None
    assert len(wrong) > 5 and scores.most_confused(100) == wrong and scores.missing_pixels == 0


def test_a_planted_read_back_fails(device, monkeypatch):
    segmenter = segmenter_on(device)
    images = torch.rand(1, 3, 16, 16).to(device)
    segmenter.sample(images)
    forward = segmenter.model.decoder.forward
    monkeypatch.setattr(segmenter.model.decoder, "forward", lambda x, s: forward(x, s) if x.isfinite().all() else x)
    with no_read_back(), pytest.raises(RuntimeError, match=WAITS):
        segmenter.sample(images)
