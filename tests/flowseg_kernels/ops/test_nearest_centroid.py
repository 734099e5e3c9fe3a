import pytest
import torch

import flowseg_kernels as fk

from ...support.samples import FLOAT_DTYPES, LABEL_DTYPES, decode_tables, image_batch, layouts


def two_smallest(x, mu):
    """Brute force in fp64 over points (N, C): the nearest index (the lowest of equals), and the two smallest squared distances."""
    index, best, second = [], [], []
    mu = mu.double()
    for part in x.split(max(1, (1 << 20) // mu.shape[0])):  # a few MiB of distances fit in the cache
        part = part.double()
        d = (part[:, 0, None] - mu[:, 0]).square_()
        for c in range(1, mu.shape[1]):
            d += (part[:, c, None] - mu[:, c]).square_()
        nearest = d.min(1, keepdim=True)
        # min may return the index of any of several equal minima.
        first = torch.where(d == nearest.values, torch.arange(mu.shape[0]), mu.shape[0]).amin(1, keepdim=True)
        index.append(first[:, 0])
        best.append(nearest.values[:, 0])
        second.append(d.scatter_(1, first, torch.inf).amin(1) if mu.shape[0] > 1 else nearest.values[:, 0])
    return torch.cat(index), torch.cat(best), torch.cat(second)


def is_nearest_beyond_doubt(x, mu, index):
    """Whether every other code is farther from points (N, C) than `index` by more than the rounding of |mu|^2 - 2 x mu in fp64.

    One product per point and class: a fifth of the time of two_smallest.
    """
    mu, found = mu.double(), []
    reach = mu.square().sum(1).amax()
    for part, own in zip(x.split(max(1, (1 << 20) // mu.shape[0])), index.split(max(1, (1 << 20) // mu.shape[0]))):
        part = part.double()
        d = torch.addmm(mu.square().sum(1), part, mu.T, alpha=-2)
        nearest = d.gather(1, own[:, None])[:, 0]
        others = d.scatter_(1, own[:, None], torch.inf).amin(1)
        found.append(others - nearest > 1e-13 * (reach + part.square().sum(1)))
    return torch.cat(found)


def assert_exact(points, codebook, mu):
    """Assert that labels equal those of the fp64 search, unless the two smallest distances agree to fp32 rounding."""
    image = points.T.reshape(1, mu.shape[1], 1, -1)
    got = fk.nearest_centroid(image, codebook)[0, 0]
    doubtful = (~is_nearest_beyond_doubt(points, mu, got.long())).nonzero()[:, 0]
    want, best, second = two_smallest(points[doubtful], mu) if len(doubtful) else (got[:0], got[:0], got[:0])
    different = torch.zeros(len(points), dtype=torch.bool)
    different[doubtful] = got[doubtful] != want
    # The error of a squared fp32 distance: rounding of differences, squares and sums.
    rounding = 4e-7 * (best + second)
    assert not (different[doubtful] & (second - best > rounding)).any(), int(different.sum())
    return different


@pytest.mark.parametrize("codes", ["kronecker", "grid", "clustered"])
def test_ten_million_random_points(codes):
    if "cpu" not in fk.available_backends("nearest_centroid"):
        pytest.skip("the C++ kernels are not built, and the reference is itself such a search")
    mu = {
        "kronecker": fk.kronecker_centroids(150, 3),
        "grid": fk.grid_centroids(64, 3),
        "clustered": 0.02 * torch.randn(40, 3, generator=torch.Generator().manual_seed(1)),
    }[codes]
    count = 10_000_000 if codes == "kronecker" else 300_000
    span = float(mu.max() - mu.min())
    points = mu.min() - 0.5 * span + 2 * span * torch.rand(count, 3)  # beyond the codes by half a box on every side
    with fk.use_backend("cpu"):
        assert_exact(points, fk.Codebook(mu), mu)


@pytest.mark.parametrize("classes, channels", [(150, 8), (1000, 16)])
def test_ten_million_points_by_guesses(classes, channels, request):
    """A hundred thousand points, or with --every-variant ten million: 3 minutes of one core."""
    if "cpu" not in fk.available_backends("nearest_centroid"):
        pytest.skip("the C++ kernels are not built, and the reference is itself such a search")
    mu = fk.kronecker_centroids(classes, channels)
    book = fk.Codebook(mu, ignore_index=-1)
    spreads = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.4])
    count = 10_000_000 if request.config.getoption("--every-variant") else 100_000
    with fk.use_backend("cpu"):
        for start in range(0, count, 1_000_000):
            n = min(1_000_000, count - start)
            points = mu[torch.randint(0, classes, (n,))]
            # A thousand points in a row have the same spread: guesses are given up where most of them fail.
            spread = spreads[torch.randint(0, 5, (-(-n // 1000), 1))].expand(-1, 1000).reshape(-1, 1)[:n]
            assert_exact(points + spread * torch.randn(n, channels), book, mu)


def assert_equals_search(x, mu):
    """Assert that a codebook gives the bits of a search through all codes, for every combination of results."""
    book = fk.Codebook(mu, ignore_index=-1)
    for wanted in ({}, {"return_distance": True}, {"return_margin": True, "return_distance": True}):
        got = fk.nearest_centroid(x, book, **wanted)
        want = fk.nearest_centroid(x, mu, ignore_index=-1, **wanted)
        for g, w in zip(got if wanted else [got], want if wanted else [want]):
            assert torch.equal(g.nan_to_num(nan=-7.0), w.nan_to_num(nan=-7.0)), wanted


@pytest.mark.many_forms(2)
@pytest.mark.parametrize("channels", [4, 5, 8, 16])
@pytest.mark.parametrize("classes", [24, 33, 34, 300, 1100])
def test_guesses_equal_a_search_near_codes(backend, brief, channels, classes):
    classes = min(classes, 80) if brief else classes
    mu = fk.kronecker_centroids(classes, channels)
    height, width = (48, 75) if backend == "cpu" else (12, 40)
    for side, spread in ((1, 0.02), (1, 0.1), (1, 0.4), (16, 0.05), (16, 0.2)):
        labels = torch.randint(0, classes, (1, -(-height // side), -(-width // side)))
        labels = labels.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]
        x = mu[labels].movedim(-1, 1) + spread * torch.randn(1, channels, height, width)
        assert_equals_search(x, mu)
    x[0, 1, 3, 5:9] = torch.nan
    x[0, :, 4, :2] = torch.tensor([torch.inf, -torch.inf])
    x[0, :, 5] *= 1e3
    x[0, :, 6] *= 1e20
    assert_equals_search(x, mu)


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_guesses_on_ties_cell_borders_and_duplicates(backend, brief, channels):
    classes = 60 if brief else 300
    # Distances between points of a lattice are exact, so ties are real ties.
    lattice = torch.randint(-2, 3, (classes, channels)).float()
    assert_equals_search(torch.randint(-6, 7, (1, channels, 20, 30)) / 2, lattice)
    doubled = fk.kronecker_centroids(classes // 2, channels).repeat(2, 1)
    assert_equals_search(doubled[torch.randint(0, classes, (600,))].T.reshape(1, channels, 20, 30), doubled)
    assert_equals_search(torch.randn(1, channels, 8, 9), torch.full((40, channels), 0.25))
    for mu in (fk.grid_centroids(classes, channels), fk.kronecker_centroids(classes, channels)):
        a, b = mu[torch.randint(0, classes, (2, 600))]
        assert_equals_search(((a + b) / 2).T.reshape(1, channels, 20, 30), mu)
        projection = decode_tables(mu)[0][0].double()
        points = torch.randn(600, channels, dtype=torch.float64)
        axis = projection[torch.randint(0, len(projection), (600,))]
        position = (points * axis[:, :-1]).sum(1) + axis[:, -1]
        # Move each point along the axis to the nearest border of cells.
        step = (position.round() - position) / axis[:, :-1].square().sum(1)
        on_border = (points + step[:, None] * axis[:, :-1]).float()
        assert_equals_search(on_border.T.reshape(1, channels, 20, 30), mu)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_guesses_for_input_dtypes_and_strides(backend, dtype):
    book = fk.Codebook(fk.kronecker_centroids(100, 8))
    x, _, _, _ = image_batch(book.centroids, 2, 17, 40, 0.05, dtype)
    want = fk.nearest_centroid(x, book)
    assert torch.equal(want, fk.nearest_centroid(x, book.centroids))
    for name, view in layouts(x):
        assert torch.equal(fk.nearest_centroid(view, book), want), name


@pytest.mark.parametrize("scale, offset", [(1e-3, 0.0), (1e6, 0.0), (1.0, 1000.0), (1e-18, 0.0), (1e14, 0.0)])
def test_guesses_for_codes_of_any_place_and_size(backend, scale, offset):
    mu = offset + scale * fk.kronecker_centroids(60, 8)
    points = mu[torch.randint(0, 60, (600,))] + 0.2 * scale * torch.randn(600, 8)
    assert_equals_search(points.T.reshape(1, 8, 20, 30), mu)


@pytest.mark.parametrize("offset, span", [(1000.0, 1.0), (-30.0, 1e-2), (0.0, 1e-5), (0.0, 1e6), (5.0, 255.0)])
def test_codes_of_any_place_and_size(backend, offset, span):
    mu = offset + span * fk.kronecker_centroids(60, 3)
    book = fk.Codebook(torch.cat((mu, mu[:5])))  # with duplicates, of which the first wins
    points = mu[torch.randint(0, 60, (20_000,))] + span * torch.tensor([0.05, 0.4, 3.0])[
        torch.randint(0, 3, (20_000, 1))
    ] * torch.randn(20_000, 3)
    assert_exact(points, book, book.centroids)


@pytest.mark.parametrize("classes", [1, 2, 3, 11, 150, 1000, 1030])
def test_cell_borders_corners_and_centroids(backend, classes):
    mu = fk.kronecker_centroids(classes, 3)
    book = fk.Codebook(mu, ignore_index=-1)
    (cells, *_), low, scale = decode_tables(mu)
    borders = low + torch.arange(cells.shape[-1] + 1) / scale
    ticks = torch.cat((borders, borders.nextafter(torch.tensor(9.0)), borders.nextafter(torch.tensor(-9.0))))
    n = 12_000
    corner = ticks[torch.randint(0, len(ticks), (n, 3))]
    face = torch.stack((ticks[torch.randint(0, len(ticks), (n,))], *(torch.rand(2, n) * 2.4 - 1.2)), dim=1)
    halfway = (mu[torch.randint(0, classes, (n,))] + mu[torch.randint(0, classes, (n,))]) / 2
    near = mu.repeat(20, 1) + 1e-6 * torch.randn(20 * classes, 3)
    far = torch.randn(500, 3) * torch.tensor([10.0, 1e6, 1e15])[torch.randint(0, 3, (500, 1))]
    points = torch.cat((corner, face, halfway, near, far))
    # Points outside the grid last: a Triton block that has one of them searches all classes, which is slow in the interpreter.
    cell = (points - low) * scale
    inside = ((cell >= 0) & (cell < cells.shape[-1])).all(1)
    points = torch.cat((points[inside], points[~inside]))
    assert_exact(points, book, mu)
    image = mu.T.reshape(1, 3, 1, -1)
    assert torch.equal(fk.nearest_centroid(image, book)[0, 0], torch.arange(classes))


def test_exact_ties_go_to_the_lowest_index(backend):
    # Powers of two make every distance exact, so ties are real ties.
    mu = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [1, 0, 0]])
    for codes in (mu, mu.flip(0)):
        book = fk.Codebook(codes)
        steps = torch.linspace(-1.5, 1.5, 25)
        points = torch.cartesian_prod(steps, steps, steps)
        want = two_smallest(points, codes)[0]
        for codebook in (book, codes):
            got = fk.nearest_centroid(points.T.reshape(1, 3, 25, 625), codebook).flatten()
            assert torch.equal(got, want)


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 12, 16])
@pytest.mark.parametrize("classes", [1, 2, 17, 300])
def test_any_channels_against_brute_force(backend, channels, classes):
    mu = fk.kronecker_centroids(classes, channels)
    assert_exact(torch.randn(5000, channels), mu, mu)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_input_dtypes_strides_and_label_dtypes(backend, dtype, codes150):
    x, _, _, _ = image_batch(codes150.centroids, 2, 17, 40, 0.1, dtype)
    want = fk.nearest_centroid(x, codes150)
    assert torch.equal(want, fk.nearest_centroid(x.double(), codes150))
    for out_dtype in LABEL_DTYPES:
        labels = fk.nearest_centroid(x, codes150, out_dtype=out_dtype)
        assert labels.dtype == out_dtype and torch.equal(labels.long(), want)
    for name, view in layouts(x):
        assert torch.equal(fk.nearest_centroid(view, codes150), want), name


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_and_margin(backend, channels, dtype):
    mu = fk.kronecker_centroids(30, channels)
    x, _, _, _ = image_batch(mu, dtype=dtype)
    index, best, second = two_smallest(x.movedim(1, -1).reshape(-1, channels), mu)
    labels, distance, margin = fk.nearest_centroid(x, fk.Codebook(mu), return_distance=True, return_margin=True)
    assert distance.dtype == margin.dtype == dtype
    assert torch.equal(labels.flatten(), index)
    torch.testing.assert_close(distance.flatten().double(), best.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(margin.flatten().double(), second.sqrt() - best.sqrt(), rtol=1e-4, atol=1e-6)
    only = fk.nearest_centroid(x, fk.Codebook(mu), return_margin=True)
    assert len(only) == 2 and torch.equal(only[1], margin)


def points_for(mu, low, scale, cells):
    """Points (N, 3) where a look-up may go wrong: borders of cells, ties, near codes, and outside the grid."""
    classes = len(mu)
    borders = low + torch.arange(cells + 1) / scale
    ticks = torch.cat((borders, borders.nextafter(torch.tensor(9.0)), borders.nextafter(torch.tensor(-9.0))))
    corner = ticks[torch.randint(0, len(ticks), (1500, 3))]
    pairs = mu[torch.randint(0, classes, (2, 1500))]
    near = mu[torch.randint(0, classes, (2500,))] + torch.tensor([0.0, 1e-6, 0.05, 0.3])[
        torch.randint(0, 4, (2500, 1))
    ] * torch.randn(2500, 3)
    points = torch.cat((corner, pairs.mean(dim=0), near))
    cell = (points - low) * scale
    inside = ((cell >= 0) & (cell < cells)).all(dim=1)
    far = torch.randn(60, 3) * torch.tensor([3.0, 1e6, 1e15, 1e25])[torch.randint(0, 4, (60, 1))]
    far[0, 1], far[1, 0], far[2, :2] = torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf])
    # Points outside the grid last: a Triton block that has one of them searches all classes, which is slow in the interpreter.
    return torch.cat((points[inside], points[~inside][:200], far))


@pytest.mark.parametrize("classes", [1, 2, 3, 24, 150, 1030])
def test_distance_and_margin_of_the_grids_are_those_of_a_full_search(backend, classes):
    mu = fk.kronecker_centroids(classes, 3)
    if classes == 24:  # powers of two make ties exact; some codes are there two or three times, far apart in the list
        mu = (8 * mu).round() / 8
        mu = torch.cat((mu, mu[:9], mu[3:9]))
    (cells, *_), low, scale = decode_tables(mu, margin=True)
    points = points_for(mu, low, scale, cells.shape[-1])
    image, book = points.T.reshape(1, 3, 1, -1), fk.Codebook(mu, ignore_index=-1)
    want = fk.nearest_centroid(image, mu, return_distance=True, return_margin=True, ignore_index=-1)
    got = fk.nearest_centroid(image, book, return_distance=True, return_margin=True)
    label, distance = fk.nearest_centroid(image, book, return_distance=True)
    for name, a, b in zip(
        ("label", "distance", "margin", "label beside distance", "distance alone"),
        (*want, *want),
        (*got, label, distance),
    ):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
    assert (want[0] == -1).sum() == 1
    good = points.isfinite().all(dim=1) & (points.abs().amax(dim=1) < 1e9)
    _, best, second = two_smallest(points[good], mu)
    torch.testing.assert_close(distance.flatten()[good].double(), best.sqrt(), rtol=1e-5, atol=1e-6)
    if classes > 1:
        # The margin is a difference of two rounded distances.
        error = (got[2].flatten()[good].double() - (second.sqrt() - best.sqrt())).abs()
        assert (error <= 1e-6 + 1e-6 * second.sqrt()).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_distance_and_margin_of_the_grids_in_every_dtype_and_layout(backend, dtype, codes150):
    x, _, _, _ = image_batch(codes150.centroids, 2, 9, 40, 0.1, dtype)
    want = fk.nearest_centroid(x, codes150.centroids, return_distance=True, return_margin=True)
    for name, view in list(layouts(x))[::2]:
        both = fk.nearest_centroid(view, codes150, return_distance=True, return_margin=True, out_dtype=torch.int16)
        distance = fk.nearest_centroid(view, codes150, return_distance=True)[1]
        assert torch.equal(both[0].long(), want[0]), name
        assert torch.equal(both[1], want[1]) and torch.equal(distance, want[1]) and torch.equal(both[2], want[2]), name


def test_one_class_has_an_infinite_margin(backend):
    labels, margin = fk.nearest_centroid(torch.randn(1, 3, 4, 5), torch.zeros(1, 3), return_margin=True)
    assert not labels.any() and margin.isposinf().all()


@pytest.mark.parametrize("codebook", ["grid", "bare"])
def test_nan_decodes_to_ignore_and_infinity_to_the_lowest(backend, codebook, codes150):
    x = torch.zeros(1, 3, 2, 300)
    x[0, 1, 0, 7] = torch.nan
    x[0, 2, 1, 299] = torch.inf
    x[0, :2, 1, 298] = torch.tensor([torch.inf, -torch.inf])
    book = codes150 if codebook == "grid" else codes150.centroids
    labels = fk.nearest_centroid(x, book, out_dtype=torch.uint8)
    assert labels[0, 0, 7] == 255 and labels[0, 1, 299] == 0 and labels[0, 1, 298] == 0
    assert (labels == 255).sum() == 1
    _, distance, margin = fk.nearest_centroid(x, book, return_distance=True, return_margin=True)
    assert distance[0, 0, 7].isnan() and margin[0, 0, 7].isnan() and distance[0, 1, 299].isposinf()


def test_ignore_index_of_the_codebook_marks_nan(backend):
    book = fk.Codebook(fk.kronecker_centroids(5, 3), ignore_index=-1)
    x = torch.full((1, 3, 1, 1), torch.nan)
    assert fk.nearest_centroid(x, book).item() == -1
    with pytest.raises(ValueError, match="out_dtype: wanted one that holds classes up to 4 and ignore_index -1"):
        fk.nearest_centroid(x, book, out_dtype=torch.uint8)


def test_decoder_module(backend, codes150):
    x, _, _, _ = image_batch(codes150.centroids)
    assert torch.equal(fk.CentroidDecoder(codes150)(x), fk.nearest_centroid(x, codes150))
