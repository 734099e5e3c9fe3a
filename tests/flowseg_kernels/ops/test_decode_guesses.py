"""Decoding by guesses (4 to 16 channels) gives what a search gives, whichever way decides a pixel; and counts by class."""

import pytest
import torch

import flowseg_kernels as fk

from ...support.samples import decode_tables, image_batch, layouts

PIXELS = 600


def images(mu, spread=0.02):
    """(3, C, 20, N): an image near the codes with few hard points, one that mixes noise of several sizes, and one of noise alone.

    Hard points are halfway between codes, far away, infinite or NaN. A GPU's program decodes only pixels of one image.
    """
    classes, channels = mu.shape

    def near(count, spread):
        return mu[torch.randint(0, classes, (count,))] + spread * torch.randn(count, channels)

    halfway = (mu[torch.randint(0, classes, (16,))] + mu[torch.randint(0, classes, (16,))]) / 2
    far = torch.randn(8, channels) * torch.tensor([10.0, 1e6, 1e15, 1e20]).repeat(2)[:, None]
    odd = near(16, spread)
    odd[::4, 1], odd[1::5, 0], odd[2::7, 2] = torch.nan, torch.inf, -torch.inf
    hard = torch.cat((halfway, far, odd))
    easy = torch.cat((mu, near(PIXELS, spread)))[: PIXELS - len(hard)]
    mixed = torch.cat([near(PIXELS // 4, s) for s in (0.05, 0.1, 0.15, 0.2)])
    points = torch.stack((torch.cat((easy, hard)), mixed, near(PIXELS, 0.6)))
    shuffled = points[:, torch.randperm(PIXELS)]
    return shuffled.transpose(1, 2).reshape(3, channels, 20, -1).contiguous()


def same(got, want):
    return torch.equal(got.nan_to_num(-7.0) if got.is_floating_point() else got, want.nan_to_num(-7.0))


@pytest.mark.parametrize("channels, classes", [(4, 60), (5, 24), (8, 90), (13, 30), (16, 33)])
def test_equals_a_search_bit_for_bit(backend, channels, classes):
    mu = fk.kronecker_centroids(classes, channels)
    book = fk.Codebook(torch.cat((mu, mu[:5], mu[7:9])), ignore_index=-1)  # with duplicates, of which the first wins
    x = images(book.centroids)
    search = fk.nearest_centroid(x, book.centroids, return_distance=True, ignore_index=-1)
    book.decode(x[:1])  # a codebook's first decode may search
    for got, want in zip(fk.nearest_centroid(x, book, return_distance=True), search):
        assert same(got, want)
    assert torch.equal(fk.nearest_centroid(x, book), search[0])


def test_ties_go_to_the_lowest_class(backend):
    # Corners of a cube: all distances are exact, and points with a zero coordinate are ties.
    mu = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
    book = fk.Codebook(torch.cat((mu.flip(0), mu)))
    steps = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.5])
    x = torch.cartesian_prod(*[steps] * 5).T.reshape(1, 5, 25, -1)
    want = ((x < 0).long() * 2 ** torch.arange(4, -1, -1)[:, None, None]).sum(1)
    for _ in range(2):
        assert torch.equal(fk.nearest_centroid(x, book), want)


def test_half_precision_and_strides(backend):
    book = fk.Codebook(fk.kronecker_centroids(30, 6), ignore_index=-1)
    x = images(book.centroids)[:2, :, :3].bfloat16()
    assert torch.equal(fk.nearest_centroid(x.half(), book), fk.nearest_centroid(x.half().float(), book))
    want = fk.nearest_centroid(x, book.centroids, ignore_index=-1)
    for name, view in layouts(x):
        assert torch.equal(fk.nearest_centroid(view, book), want), name


@pytest.mark.parametrize("classes", [30, 600])
def test_far_points_and_nan_in_small_images(backend, classes):
    """A GPU's warp stops guessing where most of its pixels are far. Some of them may be NaN."""
    book = fk.Codebook(fk.kronecker_centroids(classes, 8), ignore_index=-1)
    for pixels in (2, 3, 8, 13):
        x = 3 * torch.randn(1, 8, 1, pixels)
        x[0, 3, 0, 1::2] = torch.nan
        x[0, :, 0, 5::5] = book.centroids[0, :, None]
        found = fk.nearest_centroid(x, book, return_distance=True, return_margin=True)
        want = fk.nearest_centroid(x, book.centroids, return_distance=True, return_margin=True, ignore_index=-1)
        for got, searched in zip(found, want):
            assert same(got, searched)
        assert (found[0][0, 0, x[0, :, 0].isnan().any(0)] == -1).all()
        target = torch.zeros(1, 1, pixels, dtype=torch.int64)
        assert fk.decode_confusion(x, target, book, by_class=True)[1, 0] == (~x.isnan().any(1)).sum()


def test_triton_reads_the_tables(backend):
    if backend != "triton":
        pytest.skip("calls a Triton kernel")
    from flowseg_kernels.ops.nearest_centroid.triton_kernels import nearest_centroid

    mu = fk.kronecker_centroids(30, 8)
    (projection, starts, members, rivals, certain), *numbers = decode_tables(mu)
    lying = [projection, starts, torch.full_like(members, 3), rivals, torch.full_like(certain, torch.inf)]
    labels, *_ = nearest_centroid(images(mu)[1:2], mu, lying, *numbers, "uint8", False, False, 255)
    assert (labels == 3).float().mean() > 0.9  # the cells of the others are empty


@pytest.mark.parametrize("channels, classes", [(2, 9), (3, 30), (8, 30)], ids=["search", "grid", "guesses"])
@pytest.mark.parametrize("side", [1, 8], ids=["single_pixels", "areas"])
def test_counts_by_class_are_sums_of_the_confusion(backend, channels, classes, side):
    book = fk.Codebook(fk.kronecker_centroids(classes, channels))
    _, _, target, _ = image_batch(book.centroids, 2, 24 // side, 40 // side)
    target = target.repeat_interleave(side, 1).repeat_interleave(side, 2)
    x = book.encode(target.flip(2)) + 0.02 * torch.randn(2, channels, 24, 40)
    x[0, 0, 0, :3] = torch.nan
    for codes in (book.centroids, book):
        pairs = fk.decode_confusion(x, target, codes, ignore_index=255)
        want = torch.stack((pairs.diagonal(), pairs.sum(1), pairs.sum(0)))
        assert want[1].sum() > 1500
        for dtype in (torch.uint8, torch.int64):
            assert torch.equal(fk.decode_confusion(x, target.to(dtype), codes, ignore_index=255, by_class=True), want)
