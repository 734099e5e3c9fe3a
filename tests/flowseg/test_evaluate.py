"""Scores against torchmetrics and by hand, and what the whole path from image to confusion matrix does."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowseg.codes import build_codebook
from flowseg.data.transforms import to_tensor
from flowseg.evaluate import chosen_indices, evaluate, scores_from_confusion
from flowseg.segment import Segmenter

from .tiny import tiny_config


def test_scores_by_hand():
    # Class 0: 3 right, 1 missed to class 1. Class 1: 2 right. Class 2: nowhere. Class 3: predicted once, never true.
    confusion = torch.tensor([[3, 1, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = scores_from_confusion(confusion)
    assert scores.iou == [pytest.approx(60), pytest.approx(200 / 3), None, 0.0]
    assert scores.miou == pytest.approx((60 + 200 / 3 + 0) / 3)
    assert scores.pixel_accuracy == pytest.approx(500 / 7)
    assert scores.summary(("a", "b", "c", "d"))["iou"]["c"] is None
    assert scores_from_confusion(torch.zeros(2, 2)).miou == 0.0


class Oracle(nn.Module):
    """Reads the label from the red channel: ``label = round(12 * (red + 1))``; wrong where green is high."""

    condition_on_image = True

    def __init__(self, codebook, patch_size=8):
        super().__init__()
        self.codes = codebook
        self.size = type("Size", (), {"patch_size": patch_size})()

    def forward(self, x, t, image):
        labels = (12 * (image[:, 0] + 1) / 2).round().long().clamp(0, 10)
        labels = torch.where(image[:, 1] > 0, (labels + 1) % 11, labels)
        return self.codes.centroids[labels].movedim(-1, 1)


class Pairs(list):
    names = ()


def make_pairs(sizes, seed=0):
    rng = np.random.default_rng(seed)
    pairs = Pairs()
    for height, width in sizes:
        labels = rng.integers(0, 8, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.round(labels * (255 / 12))
        pixels[: height // 4, :, 1] = 255
        target = labels.copy()
        target[:, -3:] = 255
        pairs.append((Image.fromarray(pixels), Image.fromarray(target)))
    return pairs


def make_segmenter(**sections):
    config = tiny_config(data={"height": 32, "width": 32}, **sections)
    codebook = build_codebook(config.codes, 11)
    return Segmenter(Oracle(codebook), codebook, config)


def test_evaluation_agrees_with_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    pairs = make_pairs([(32, 32)] * 5)
    segmenter = make_segmenter(sample={"batch_size": 2})
    scores = evaluate(segmenter, pairs)
    metric = MulticlassJaccardIndex(num_classes=11, ignore_index=255, average="none")
    for image, target in pairs:
        predicted = segmenter.model(None, None, to_tensor(image)[None])
        metric.update(segmenter.codebook.decode(predicted), torch.from_numpy(np.array(target)).long()[None])
    expected = metric.compute() * 100
    present = [k for k, value in enumerate(scores.iou) if value is not None]
    assert set(range(8)) <= set(present)
    np.testing.assert_allclose([scores.iou[k] for k in present], expected[present].numpy(), rtol=1e-5)
    assert scores.miou == pytest.approx(float(expected[present].mean()), rel=1e-5)
    assert 60 < scores.pixel_accuracy < 90 and scores.images == 5


@pytest.mark.parametrize("upsample", ["codes", "labels", "probabilities"])
def test_native_resolution_of_mixed_sizes(upsample):
    # Twice the model's size, and a size that needs padding to whole patches.
    pairs = make_pairs([(64, 64), (64, 64), (64, 40), (32, 32)])
    segmenter = make_segmenter(sample={"upsample": upsample})
    scores = evaluate(segmenter, pairs)
    assert int(scores.confusion.sum()) == sum(int((np.array(t) != 255).sum()) for _, t in pairs)
    assert scores.images == 4
    for image, target in pairs:
        assert segmenter.labels(image).shape == np.array(target).shape


def test_labels_agree_with_evaluation_and_margin_is_a_gap():
    (image, target), *_ = make_pairs([(64, 64)])
    segmenter = make_segmenter()
    labels, margin = segmenter.labels(image, with_margin=True)
    assert torch.equal(labels, segmenter.labels(image)) and labels.dtype == torch.uint8
    assert margin.shape == labels.shape and float(margin.min()) >= 0
    # The oracle lands on codes, where the gap to the next is at least the squared smallest distance.
    assert float(margin.min()) >= segmenter.codebook.min_distance * 0.999
    valid = torch.from_numpy(np.array(target)) != 255
    hits = (labels == torch.from_numpy(np.array(target)))[valid].double().mean()
    assert evaluate(segmenter, Pairs([(image, target)])).pixel_accuracy == pytest.approx(100 * float(hits))


def test_limit_spreads_over_the_split():
    assert chosen_indices(10, 3) == [0, 4, 9] and chosen_indices(3, 10) == [0, 1, 2] and chosen_indices(9, 1) == [0]
    assert evaluate(make_segmenter(), make_pairs([(32, 32)] * 6), limit=2).images == 2


def test_pixels_that_are_not_numbers_count_as_wrong():
    pairs = make_pairs([(32, 32)] * 2)
    segmenter = make_segmenter()
    before = evaluate(segmenter, pairs)
    sound = segmenter.native_field

    def broken(images):
        field = sound(images)
        field[..., :16] = torch.nan
        return field

    segmenter.native_field = broken
    after = evaluate(segmenter, pairs)
    labelled = sum(int((np.array(t) != 255).sum()) for _, t in pairs)
    assert after.undecided > 0 and int(after.confusion.sum()) + after.undecided == labelled
    assert after.pixel_accuracy < before.pixel_accuracy and after.miou < before.miou
    assert after.summary(tuple("abcdefghijk"))["undecided_pixels"] == after.undecided
