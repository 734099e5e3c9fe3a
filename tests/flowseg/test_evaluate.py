"""Scores compared with torchmetrics and by hand, and the whole path from an image to the confusion matrix."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flowseg.data.transforms import to_tensor
from flowseg.errors import UserError
from flowseg.inference.evaluate import chosen_indices, evaluate, scores_from_confusion
from flowseg.inference.views import interpolated_columns, window_starts
from flowseg.model.sizes import resolve_size
from flowseg_kernels import decode_confusion, nearest_centroid

from .support.networks import Oracle, Pairs, Waves, make_pairs, oracle_segmenter
from .tiny import tiny_config


def test_scores_by_hand():
    # Class 0: 3 right, 1 taken for class 1, 1 for class 3. Class 1: 2 right. Class 2 never occurs. Class 3 is never true.
    confusion = torch.tensor([[3, 1, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = scores_from_confusion(confusion)
    assert scores.iou == [pytest.approx(60), pytest.approx(200 / 3), None, 0.0]
    assert scores.miou == pytest.approx((60 + 200 / 3 + 0) / 3)
    assert scores.pixel_accuracy == pytest.approx(500 / 7)
    assert scores.summary(("a", "b", "c", "d"))["iou"]["c"] is None
    assert scores_from_confusion(torch.zeros(2, 2)).miou == 0.0


@pytest.mark.parametrize("size", [(16, 16), (32, 64)])
def test_labels_of_another_size_than_the_image_are_refused(size):
    pairs = make_pairs([(32, 32)] * 3)
    pairs[1] = pairs[1][0], Image.new("L", size[::-1])
    message = rf"pairs\[1\]: .*height 32 and width 32; their shape is \({size[0]}, {size[1]}\)"
    with pytest.raises(UserError, match=message):
        evaluate(oracle_segmenter(), pairs)


def test_evaluation_agrees_with_torchmetrics():
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    pairs = make_pairs([(32, 32)] * 5)
    segmenter = oracle_segmenter(sample={"batch_size": 2})
    scores = evaluate(segmenter, pairs)
    metric = MulticlassJaccardIndex(num_classes=11, ignore_index=255, average="none")
    accuracy = MulticlassAccuracy(num_classes=11, ignore_index=255, average="micro")
    for image, target in pairs:
        predicted = segmenter.model(None, None, to_tensor(image)[None])
        for one in (metric, accuracy):
            one.update(segmenter.codebook.decode(predicted), torch.from_numpy(np.array(target)).long()[None])
    expected = metric.compute() * 100
    present = [k for k, value in enumerate(scores.iou) if value is not None]
    assert set(range(8)) <= set(present)
    np.testing.assert_allclose([scores.iou[k] for k in present], expected[present].numpy(), rtol=1e-5)
    assert scores.miou == pytest.approx(float(expected[present].mean()), rel=1e-5)
    assert scores.pixel_accuracy == pytest.approx(100 * float(accuracy.compute()))
    assert 60 < scores.pixel_accuracy < 90 and scores.images == 5


class Drifting(nn.Module):
    """Returns a mix of its state and the image, so the result depends on the noise of the source."""

    condition_on_image = True

    def __init__(self):
        super().__init__()
        self.size = resolve_size(tiny_config().model)

    def forward(self, x, t, image):
        return 0.5 * x + 0.2 * image


def official_ade20k(predictions, truths, classes):
    """Sums of the challenge's own code: intersections, unions and pixel accuracy. Classes are 1..K; truth 0 is ignored."""
    intersection, union, right, labelled = np.zeros(classes), np.zeros(classes), 0, 0
    for predicted, truth in zip(predictions, truths):
        predicted = predicted * (truth > 0)
        both = predicted * (predicted == truth)
        areas = [np.histogram(area, bins=classes, range=(1, classes))[0] for area in (both, predicted, truth)]
        intersection += areas[0]
        union += areas[1] + areas[2] - areas[0]
        right, labelled = right + (both > 0).sum(), labelled + (truth > 0).sum()
    return intersection, union, right / labelled


def test_evaluation_agrees_with_the_official_formula_of_ade20k():
    pairs = make_pairs([(32, 32), (32, 48), (24, 64)], seed=3)
    segmenter = oracle_segmenter()
    scores = evaluate(segmenter, pairs)
    predictions = [segmenter.labels(image).numpy().astype(int) + 1 for image, _ in pairs]
    truths = [np.where(np.array(target) == 255, 0, np.array(target).astype(int) + 1) for _, target in pairs]
    intersection, union, accuracy = official_ade20k(predictions, truths, 11)
    for k, value in enumerate(scores.iou):
        assert (value is None) == (union[k] == 0)
        assert value is None or value == pytest.approx(100 * intersection[k] / union[k])
    assert scores.pixel_accuracy == pytest.approx(100 * accuracy)
    # The official mean counts a class that never occurs as 0; in the whole validation set every class occurs.
    assert scores.miou == pytest.approx(100 * (intersection / np.maximum(union, 1))[union > 0].mean())


def test_scores_with_a_noise_source_do_not_depend_on_the_batch_size():
    pairs = make_pairs([(32, 32)] * 5, seed=5)
    found = []
    for size in (1, 2, 5):
        segmenter = oracle_segmenter(flow={"source": "noise"}, sample={"batch_size": size})
        segmenter.model = Drifting()
        found.append(evaluate(segmenter, pairs).confusion)
    assert all(torch.equal(one, found[0]) for one in found)
    # Other noise would change the result.
    moved = segmenter.sample(torch.zeros(2, 3, 32, 32), seed=0) - segmenter.sample(torch.zeros(2, 3, 32, 32), seed=1)
    assert moved.abs().max() > 0.1


def test_processes_sum_counts_not_scores():
    pairs = make_pairs([(32, 32)] * 3 + [(64, 64)] * 2 + [(32, 48)] * 2)
    segmenter = oracle_segmenter(sample={"batch_size": 2})
    alone = evaluate(segmenter, pairs)
    parts = []
    for rank in range(2):
        evaluate(segmenter, pairs, rank=rank, world=2, add_up=lambda sums: parts.append(sums.clone()) or sums)
    both = evaluate(segmenter, pairs, rank=0, world=2, add_up=lambda sums: parts[0] + parts[1])
    assert torch.equal(both.confusion, alone.confusion) and both.images == alone.images == 7
    assert both.miou == alone.miou
    means = [evaluate(segmenter, pairs, rank=rank, world=2).miou for rank in range(2)]
    assert sum(means) / 2 != pytest.approx(alone.miou, abs=1e-6)


@pytest.mark.parametrize("upsample", ["codes", "labels", "probabilities"])
def test_images_of_mixed_sizes_are_scored_at_native_resolution(upsample):
    # Twice the training size, and a size that needs padding to whole patches.
    pairs = make_pairs([(64, 64), (64, 64), (64, 40), (32, 32)])
    segmenter = oracle_segmenter(sample={"upsample": upsample})
    scores = evaluate(segmenter, pairs)
    assert int(scores.confusion.sum()) == sum(int((np.array(t) != 255).sum()) for _, t in pairs)
    assert scores.images == 4
    for image, target in pairs:
        assert segmenter.labels(image).shape == np.array(target).shape


def test_labels_agree_with_evaluation_and_the_margin_is_the_gap_to_the_next_code():
    (image, target), *_ = make_pairs([(64, 64)])
    segmenter = oracle_segmenter()
    labels, margin = segmenter.labels(image, with_margin=True)
    assert torch.equal(labels, segmenter.labels(image)) and labels.dtype == torch.uint8
    assert margin.shape == labels.shape and float(margin.min()) >= 0
    # The oracle's fields are exact codes, where the margin is at least the smallest distance between two codes.
    assert float(margin.min()) >= segmenter.codebook.min_distance * 0.999
    valid = torch.from_numpy(np.array(target)) != 255
    hits = (labels == torch.from_numpy(np.array(target)))[valid].double().mean()
    assert evaluate(segmenter, Pairs([(image, target)])).pixel_accuracy == pytest.approx(100 * float(hits))


def test_a_limit_chooses_images_evenly_over_the_split():
    assert chosen_indices(10, 3) == [0, 4, 9] and chosen_indices(3, 10) == [0, 1, 2] and chosen_indices(9, 1) == [0]
    assert evaluate(oracle_segmenter(), make_pairs([(32, 32)] * 6), limit=2).images == 2


@pytest.mark.parametrize("sample", [{}, {"upsample": "codes"}, {"upsample": "probabilities"}, {"flip": True}])
def test_nan_pixels_count_as_wrong(sample):
    pairs = make_pairs([(64, 64)] * 2)
    segmenter = oracle_segmenter(sample=sample)
    before = evaluate(segmenter, pairs)
    sound = segmenter.sample

    def broken(pixels):
        field = sound(pixels)
        field[..., :16] = torch.nan
        return field

    segmenter.sample = broken
    after = evaluate(segmenter, pairs)
    labelled = sum(int((np.array(t) != 255).sum()) for _, t in pairs)
    assert after.undecided > 0 and int(after.confusion.sum()) + after.undecided == labelled
    assert after.pixel_accuracy < before.pixel_accuracy and after.miou < before.miou
    assert after.summary(tuple("abcdefghijk"))["undecided_pixels"] == after.undecided


@pytest.mark.parametrize(
    "sample",
    [
        {"window": "slide"},
        {"window": "slide", "stride": 1.0, "resize": "cover"},
        {"flip": True},
        {"scales": [1.0, 2.0]},
        {"window": "slide", "resize": "native", "flip": True, "scales": [1.0, 0.5], "upsample": "probabilities"},
    ],
)
@pytest.mark.parametrize("size", [(72, 40), (40, 24), (33, 70)])
def test_views_of_a_pixelwise_network_change_nothing(sample, size):
    # The oracle looks at each pixel alone: windows, mirrors and scales must return every label to its pixel.
    labels = np.kron(np.arange(6).reshape(2, 3), np.ones((size[0] // 2 + 1, size[1] // 3 + 1)))[: size[0], : size[1]]
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 0] = np.round(labels * (255 / 12))
    image = Image.fromarray(pixels)
    segmenter = oracle_segmenter(sample=sample)
    seen = []
    segmenter.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    found = segmenter.labels(image).numpy()
    # Resizing may move an edge between classes by a pixel or two: compare only pixels away from edges.
    inner = np.ones(size, bool)
    for axis in (0, 1):
        changes = np.flatnonzero(np.diff(labels, axis=axis).any(1 - axis))
        for change in changes:
            inner[(slice(None),) * axis + (slice(max(change - 3, 0), change + 5),)] = False
    assert (found == labels)[inner].all() and inner.mean() > 0.2
    if sample.get("window") == "slide":
        assert set(seen) == {(32, 32)}
    else:
        assert all(height % 8 == 0 and width % 8 == 0 for height, width in seen)


def test_windows_cover_the_axis_and_the_last_one_ends_with_it():
    for length in range(1, 90):
        starts = window_starts(length, 32, 21)
        covered = {place for start in starts for place in range(start, start + 32)}
        assert set(range(length)) <= covered and (length <= 32 or starts[-1] == length - 32)
        assert len(set(starts)) == len(starts)


def test_views_are_averaged_as_probabilities():
    segmenter = oracle_segmenter(sample={"flip": True})
    codes = segmenter.codebook.centroids

    class TwoMinds(Oracle):
        # Certain of class 2 for the image, nearly undecided between 5 and 2 for the mirror image.
        def forward(self, x, t, image):
            point = codes[2] if image[0, 0, 0, 0] < 0 else 0.55 * codes[5] + 0.45 * codes[2]
            return point[None, :, None, None].expand(len(x), -1, *x.shape[-2:])

    segmenter.model = TwoMinds(segmenter.codebook)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:, 0] = 255
    image = Image.fromarray(pixels)
    assert (segmenter.labels(image) == 2).all()


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 100])
def test_every_solver_and_step_count_gives_the_same_scores_for_an_end_point(method, steps):
    pairs = make_pairs([(32, 32)])
    segmenter = oracle_segmenter(sample={"method": method, "steps": steps})
    # The oracle's end point does not depend on x, so every solver must reach it.
    assert evaluate(segmenter, pairs).confusion.equal(evaluate(oracle_segmenter(), pairs).confusion)


def speckled(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("upsample", ["codes", "labels", "probabilities"])
@pytest.mark.parametrize("views", [{}, {"flip": True}, {"scales": [1.0, 0.5]}, {"window": "slide", "resize": "cover"}])
def test_labels_and_scores_equal_those_of_the_native_field(channels, upsample, views):
    segmenter = oracle_segmenter(sample={"upsample": upsample, **views}, codes={"channels": channels})
    segmenter.model = Waves()
    image = speckled(190, 411)
    field = segmenter.native_field([image])
    wanted, margin = nearest_centroid(field, segmenter.codebook, out_dtype=torch.uint8, return_margin=True)
    found, found_margin = segmenter.labels(image, with_margin=True)
    assert torch.equal(found, wanted[0]) and torch.equal(found_margin, margin[0]) and len(found.unique()) > 5
    target = np.random.default_rng(1).integers(0, 11, (190, 411)).astype(np.uint8)
    target[:9] = 255
    scores = evaluate(segmenter, Pairs([(image, Image.fromarray(target))]))
    counts = decode_confusion(field, torch.from_numpy(target)[None], segmenter.codebook, ignore_index=255)
    assert torch.equal(scores.confusion, counts)


def test_interpolating_some_columns_at_a_time_gives_the_same_field():
    field = torch.randn(5, 30, 50)
    whole = torch.nn.functional.interpolate(field[None], size=(170, 333), mode="bilinear")[0]
    for numbers in (1, 5 * 170 * 20, 10**9):
        parts = list(interpolated_columns(field, (170, 333), numbers))
        assert torch.equal(torch.cat([part for _, part in parts], -1), whole)
        assert [columns.start for columns, _ in parts] == [0, *(columns.stop for columns, _ in parts[:-1])]
        assert all(part.numel() <= max(numbers, 5 * 170) for _, part in parts)
