"""Decoding by guesses in the CUDA kernels on the host: each way to decide a pixel, and counts by class in each place.

Images are as wide as a few tiles. Their codes, noise and special values lie in runs, so that a block decides some tiles by guesses
alone, some with searches that a warp shares, and some by a search of the block.
"""

import pytest
import torch

import flowseg_kernels as fk

from ...host_cuda import kernels as host_kernels
from ...support.samples import decode_tables, layouts


def tiles(mu, spreads, pixels=300):
    """(1, C, 2, N) pixels: a run near codes per spread, then points halfway between codes, far away, special, and the codes."""
    classes, channels = mu.shape
    near = [mu[torch.randint(0, classes, (pixels,))] + s * torch.randn(pixels, channels) for s in spreads]
    halfway = (mu[torch.randint(0, classes, (pixels,))] + mu[torch.randint(0, classes, (pixels,))]) / 2
    far = torch.randn(40, channels) * torch.tensor([10.0, 1e6, 1e15, 1e20])[torch.randint(0, 4, (40, 1))]
    odd = mu[torch.randint(0, classes, (60,))] + 0.05 * torch.randn(60, channels)
    odd[::4, 1], odd[1::5, 0], odd[2::7, 2] = torch.nan, torch.inf, -torch.inf
    points = torch.cat((*near, halfway, far, odd, mu))
    points = points[: len(points) // 2 * 2]
    return points.T.reshape(1, channels, 2, -1).contiguous()


def assert_equals_search(x, book):
    """Labels, distances and margins of a codebook equal those of its bare codes, which are searched, bit for bit."""
    search = fk.nearest_centroid(
        x, book.centroids, return_distance=True, return_margin=True, ignore_index=book.ignore_index
    )
    everything = fk.nearest_centroid(x, book, return_distance=True, return_margin=True)
    for got, want in zip(everything, search):
        assert torch.equal(got.nan_to_num(-7.0) if got.is_floating_point() else got, want.nan_to_num(-7.0))
    labels, distance = fk.nearest_centroid(x, book, return_distance=True)
    assert torch.equal(labels, search[0]) and torch.equal(distance.nan_to_num(-7.0), search[1].nan_to_num(-7.0))
    assert torch.equal(fk.nearest_centroid(x, book), search[0])


@pytest.mark.parametrize("channels, classes", [(4, 24), (5, 600), (8, 24), (8, 600), (12, 100), (16, 600)])
def test_equals_the_search_bit_for_bit(backend, channels, classes):
    mu = fk.kronecker_centroids(classes, channels)
    book = fk.Codebook(torch.cat((mu, mu[:5], mu[7:9])), ignore_index=-1)  # with duplicates, of which the first wins
    x = tiles(book.centroids, (0.02, 0.1, 0.4))
    assert_equals_search(x, book)
    shuffled = x.flatten(2)[:, :, torch.randperm(x[0, 0].numel())].view(x.shape)
    assert_equals_search(shuffled.half(), book)
    for name, view in layouts(shuffled[..., :150].bfloat16()):
        assert torch.equal(
            fk.nearest_centroid(view, book), fk.nearest_centroid(view, book.centroids, ignore_index=-1)
        ), name


def test_the_tables_decide(backend):
    """Every pixel is proved to have its first guess if the tables say so: the kernels use them."""
    mu = fk.kronecker_centroids(30, 8)
    tables, *rest = decode_tables(mu)
    projection, starts, members, rivals, certain = tables
    book = fk.Codebook(mu)
    x, found = tiles(mu, (0.4,), 200)[..., :200].contiguous(), torch.empty(1, 2, 200, dtype=torch.uint8)
    lying = [projection, starts, torch.full_like(members, 3), rivals, torch.full_like(certain, torch.inf)]
    host_kernels.nearest_centroid(x, book.centroids, lying, *rest, found, None, None, 255)
    filled = int((starts[1:] > starts[:-1]).sum()) / (len(starts) - 1)
    assert (found == 3).float().mean() > 0.9 * filled


@pytest.mark.parametrize("classes", [30, 130, 4500])
@pytest.mark.parametrize("channels", [2, 3, 8])
def test_counts_by_class(backend, channels, classes):
    """In shared memory, and above kMostClassBytes, or without words of a grid, in global memory."""
    book = fk.Codebook(fk.kronecker_centroids(classes, channels), ignore_index=-1)
    target = torch.randint(0, classes, (2, 9, 13)).repeat_interleave(4, 1).repeat_interleave(8, 2)
    x = book.encode(target) + (0.02 if channels == 8 else 0.3 / classes) * torch.randn(2, channels, 36, 104)
    target[:, 3, 5:40] = 0
    target[0, 4], target[1, 7, 9] = -1, classes
    x[1, 0, 20, 50] = torch.nan
    labels = fk.nearest_centroid(x, book)
    counted = (target >= 0) & (target < classes) & (labels >= 0)
    truth, label = target[counted], labels[counted].long()
    want = [torch.bincount(v, minlength=classes) for v in (truth[truth == label], truth, label)]
    got = fk.decode_confusion(x, target, book, by_class=True)
    assert torch.equal(got, torch.stack(want)) and 0 < got[0].sum() < got[1].sum()
