import pytest
import torch

import flowseg_kernels as fk

from ..samples import LABEL_DTYPES, image_batch, layouts


def count_pairs(truth, prediction, classes):
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for t, p in zip(truth.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255 and p != 255:
            counts[t, p] += 1
    return counts


@pytest.mark.parametrize("channels", [2, 3, 8])
@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_equals_counting_one_by_one(backend, channels, spread):
    book = fk.Codebook(fk.kronecker_centroids(19, channels))
    x, _, target, _ = image_batch(book.centroids, 2, 21, 33, spread)
    x[0, 0, 0, 0] = torch.nan
    want = count_pairs(target, fk.nearest_centroid(x, book), 19)
    for dtype in LABEL_DTYPES:
        assert torch.equal(fk.decode_confusion(x, target.to(dtype), book), want)
    assert torch.equal(fk.decode_confusion(x, target, book.centroids), want)
    for name, view in layouts(x):
        assert torch.equal(fk.decode_confusion(view, target, book), want), name


def test_many_classes_share_one_array(backend):
    book = fk.Codebook(fk.kronecker_centroids(1100, 3), ignore_index=-1)
    target = torch.randint(0, 1100, (1, 80, 90))
    counts = fk.decode_confusion(book.encode(target), target, book)
    assert counts.sum() == target.numel() and counts.diagonal().sum() == target.numel()


def test_equals_torchmetrics(backend):
    torchmetrics = pytest.importorskip("torchmetrics")
    book = fk.Codebook(fk.kronecker_centroids(7, 3))
    x, _, target, _ = image_batch(book.centroids, 3, 30, 40, 0.6)
    metric = torchmetrics.ConfusionMatrix(task="multiclass", num_classes=7, ignore_index=255)
    metric.update(book.decode(x), target)
    assert torch.equal(fk.decode_confusion(x, target, book), metric.compute())
