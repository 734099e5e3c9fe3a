import pytest
import torch

import flowseg_kernels as fk

from ...support.samples import LABEL_DTYPES, image_batch, layouts


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


@pytest.mark.parametrize("classes", [19, 200], ids=["counts_per_thread", "shared_counts"])
@pytest.mark.parametrize("side", [1, 30], ids=["single_pixels", "areas"])
def test_threads_count_every_pixel_once(backend, classes, side):
    """Each thread has its own counts if there are few classes. Else all add to one array, equal neighbours in one addition."""
    book = fk.Codebook(fk.kronecker_centroids(classes, 3))
    height, width = (90, 150) if backend != "triton" else (30, 60)
    target = torch.randint(0, classes, (1, -(-height // side), -(-width // side)))
    target = target.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width].contiguous()
    target[0, 1, :5] = book.ignore_index
    x = book.encode(target.flip(1)) + 0.02 * torch.randn(1, 3, height, width)
    truth, found = target.flatten(), fk.nearest_centroid(x, book).flatten().long()
    pairs = (truth * classes + found)[truth != book.ignore_index]
    want = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(fk.decode_confusion(x, target, book), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("classes, channels", [(19, 3), (300, 3), (60, 8)])
@pytest.mark.parametrize("side", [1, 15], ids=["single_pixels", "areas"])
def test_counts_by_class_are_the_sums_of_the_pairs(backend, classes, channels, side):
    book = fk.Codebook(fk.kronecker_centroids(classes, channels), ignore_index=-1)
    target = torch.randint(0, classes, (1, 2, 3)) if side > 1 else torch.randint(0, classes, (1, 30, 45))
    target = target.repeat_interleave(side, 1).repeat_interleave(side, 2).contiguous()
    x = book.encode(torch.where(torch.rand(target.shape) < 0.3, target.flip(1), target))
    target[0, 1, :5] = book.ignore_index
    x[0, 1, 2, :4] = torch.nan
    pairs = fk.decode_confusion(x, target, book)
    want = torch.stack((pairs.diagonal(), pairs.sum(1), pairs.sum(0)))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for codes in (book, book.centroids):
                got = fk.decode_confusion(x, target, codes, ignore_index=None if codes is book else -1, by_class=True)
                assert got.dtype == torch.int64 and torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


def test_many_classes(backend):
    book = fk.Codebook(fk.kronecker_centroids(1100, 3), ignore_index=-1)
    target = torch.randint(0, 1100, (1, 80, 90))
    counts = fk.decode_confusion(book.encode(target), target, book)
    assert counts.sum() == target.numel() and counts.diagonal().sum() == target.numel()


def test_counts_that_do_not_fit_into_memory_name_by_class(monkeypatch):
    monkeypatch.setattr("flowseg_kernels.ops.decode_confusion.op._fits", lambda classes, device: False)
    x, target = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    codes = torch.arange(12_000.0)[:, None]
    with pytest.raises(RuntimeError, match=r"12000 x 12000 classes take 1\.2 GB.*by_class=True they take 0\.3 MB"):
        fk.decode_confusion(x, target, codes, ignore_index=-1)
    assert fk.decode_confusion(x, target, codes, ignore_index=-1, by_class=True)[0, 0] == 4


def test_equals_torchmetrics(backend):
    torchmetrics = pytest.importorskip("torchmetrics")
    book = fk.Codebook(fk.kronecker_centroids(7, 3))
    x, _, target, _ = image_batch(book.centroids, 3, 30, 40, 0.6)
    metric = torchmetrics.ConfusionMatrix(task="multiclass", num_classes=7, ignore_index=255)
    metric.update(book.decode(x), target)
    assert torch.equal(fk.decode_confusion(x, target, book), metric.compute())
