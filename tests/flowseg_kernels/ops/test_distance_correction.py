import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.ops.distance_correction.reference import TRANSFORMS, potential
from flowseg_kernels.runtime.triton import INTERPRETED

from ...support.samples import (
    FLOAT_DTYPES,
    LABEL_DTYPES,
    exact_correction,
    image_batch,
    largest_error,
    layouts,
    logits_and_slope,
    naive_correction,
)

TAUS = (1.0, 0.5, 2.0)


def test_two_classes_on_a_line_by_hand(backend):
    # x = 0.5 between codes 0 and 2, class 0, eps = 0.75: d = (0.25, 2.25), r = (1, 1/3), p = (3/4, 1/4).
    # grad = 2 [ (1/4) 1 0.5 - (1/4) (1/3) (-1.5) ] = 0.5.
    x = torch.tensor([[[[0.5]]]])
    grad = fk.distance_correction(x, torch.zeros(1, 1, 1, dtype=torch.long), torch.tensor([[0.0], [2.0]]), eps=0.75)
    assert grad.item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 11, 16])
def test_is_the_gradient_of_the_potential(backend, transform, tau, channels):
    mu = fk.kronecker_centroids(23, channels, dtype=torch.float64)
    x, _, labels, _ = image_batch(mu, dtype=torch.float64)
    x.requires_grad_()
    phi = potential(x, labels, mu, tau, 0.05, transform, 255).sum()
    (want,) = torch.autograd.grad(phi, x)
    got = fk.distance_correction(x, labels, mu, temperature=tau, eps=0.05, transform=transform)
    assert not got.requires_grad and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("spread", [0.3, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("channels", [3, 8])
def test_fp32_error_is_at_most_twice_plain_pytorch(backend, transform, tau, spread, channels):
    book = fk.Codebook(fk.kronecker_centroids(150, channels))
    x, _, labels, _ = image_batch(book.centroids, 1, 32, 40, spread)
    options = {"eps": book.default_eps, "transform": transform}
    exact = exact_correction(x, labels, book.centroids, tau=tau, **options)
    plain = naive_correction(x, labels, book.centroids, tau=tau, **options)
    got = fk.distance_correction(x, labels, book, temperature=tau, **options)
    # 1e-30: if every other class has a probability below exp(-60), the result is near the end of fp32's range.
    floor = 1e-30 + 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert largest_error(got, exact) <= max(2 * largest_error(plain, exact), floor)


@pytest.mark.many_forms(7)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("spread", [0.1, 1e-2, 1e-4])
def test_half_precision_error_is_at_most_twice_plain_pytorch(backend, dtype, transform, tau, spread, codes150):
    x, _, labels, _ = image_batch(codes150.centroids, 1, 20, 24, spread, dtype)
    options = {"eps": codes150.default_eps, "transform": transform}
    exact = exact_correction(x, labels, codes150.centroids, tau=tau, **options)
    plain = naive_correction(x, labels, codes150.centroids, tau=tau, **options)
    got = fk.distance_correction(x, labels, codes150, temperature=tau, transform=transform)
    assert got.dtype == dtype
    # 1e-30: as in the fp32 test above.
    assert largest_error(got, exact) <= max(2 * largest_error(plain, exact), 1e-30)
    # The error is also at most that of rounding the exact result to the dtype.
    assert largest_error(got, exact) <= 1.01 * largest_error(exact.to(dtype), exact) + 1e-5


def test_own_weights_that_dominate_leave_the_rest_exact(backend, codes150):
    """The lower half of the image lies on its centroids, where the own weight is 1 / eps; the upper half lies between centroids."""
    labels = torch.randint(0, 150, (1, 24, 32))
    noise = torch.randn(1, 3, 24, 32)
    noise[:, :, :12] *= 0.3
    noise[:, :, 12:] *= 1e-4
    x, eps = codes150.encode(labels) + noise, 0.01 * codes150.default_eps
    exact = exact_correction(x, labels, codes150.centroids, eps=eps)[:, :, 12:]
    plain = naive_correction(x, labels, codes150.centroids, eps=eps)[:, :, 12:]
    got = fk.distance_correction(x, labels, codes150, eps=eps)[:, :, 12:]
    bound = 2 * largest_error(plain, exact) if backend == "reference" else 2e-6 * float(exact.abs().max())
    assert largest_error(got, exact) <= bound


@pytest.mark.parametrize("classes", [1, 2, 255, 256, 257, 3000])
def test_sums_stay_accurate_for_any_number_of_classes(backend, classes, request):
    if backend == "triton" and INTERPRETED and not request.config.getoption("--every-variant"):
        # The interpreter is slow, and 65 runs of 16 classes already wrap the kernel's mask of 64 runs.
        classes = min(classes, 1040)
    book = fk.Codebook(fk.kronecker_centroids(classes, 3), ignore_index=-1)
    labels = torch.randint(0, classes, (1, 16, 20))
    x = book.encode(labels) + 0.05 * torch.randn(1, 3, 16, 20)
    exact = exact_correction(x, labels, book.centroids, eps=book.default_eps, ignore=-1)
    plain = naive_correction(x, labels, book.centroids, eps=book.default_eps, ignore=-1)
    got = fk.distance_correction(x, labels, book)
    scale = max(float(exact.abs().max()), 1e-3)
    assert largest_error(got, exact) <= max(2 * largest_error(plain, exact), 5e-7 * scale)
    if classes == 1:
        assert not got.any()


@pytest.mark.parametrize(
    "scale, eps", [(1e-30, 1e-2), (1e3, 1e-2), (1e6, 1e-2), (1e12, 1.0), (1.0, 1e-14), (1.0, 1e-30)]
)
def test_far_points_and_tiny_eps_give_finite_and_accurate_results(backend, scale, eps):
    mu = fk.kronecker_centroids(40, 3)
    x = torch.randn(1, 3, 12, 15) * scale
    labels = torch.randint(0, 40, (1, 12, 15))
    exact = exact_correction(x, labels, mu, eps)
    plain = naive_correction(x, labels, mu, eps)
    got = fk.distance_correction(x, labels, mu, eps=eps)
    assert torch.isfinite(got).all()
    assert largest_error(got, exact) <= max(2 * largest_error(plain, exact), 1e-6 * float(exact.abs().max()))


@pytest.mark.many_forms(2)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tau", [1.0, 0.05])
@pytest.mark.parametrize("channels", [8, 16])
def test_the_nearest_code_may_come_at_any_place(backend, transform, tau, channels):
    """Kernels may leave out classes whose weight is 0 beside that of the nearest code, which may be the first or the last."""
    book = fk.Codebook(fk.kronecker_centroids(100, channels))
    labels = torch.randint(0, 100, (1, 10, 30))
    near = book.encode(torch.arange(100).view(1, 10, 10))
    # Each code once, points between two codes, and points far from all codes.
    x = torch.cat([near, (near + near.flip(2, 3)) / 2, 30 * near], 3) + 0.02 * torch.randn(1, channels, 10, 30)
    options = {"eps": book.default_eps, "transform": transform}
    exact = exact_correction(x, labels, book.centroids, tau=tau, **options)
    plain = naive_correction(x, labels, book.centroids, tau=tau, **options)
    got = fk.distance_correction(x, labels, book, temperature=tau, **options)
    distance = (x.double()[:, None] - book.centroids.double()[None, :, :, None, None]).square().sum(2)
    # A share is as inexact as its logit, whose rounding grows with the logit.
    logits = logits_and_slope(distance, **options)[0] / tau
    rounding = torch.finfo(torch.float32).eps * (torch.softmax(logits, 1) * logits.abs()).sum(1)
    for part in (slice(10), slice(10, 20), slice(20, 30)):
        want, bound = exact[..., part], 2 * largest_error(plain[..., part], exact[..., part])
        floor = 1e-30 + float(want.abs().max()) * (5e-7 + 4 * float(rounding[..., part].max()))
        assert largest_error(got[..., part], want) <= max(bound, floor)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_label_dtypes_give_the_same(backend, dtype, codes19):
    x, _, labels, _ = image_batch(codes19.centroids)
    want = fk.distance_correction(x, labels, codes19)
    labels = labels if dtype != torch.uint8 else labels.clamp_max(255)
    assert torch.equal(fk.distance_correction(x, labels.to(dtype), codes19), want)


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_any_strides_give_the_same(backend, dtype, codes19):
    x, _, labels, _ = image_batch(codes19.centroids, 2, 7, 24, dtype=dtype)
    want = fk.distance_correction(x, labels, codes19)
    for name, view in layouts(x):
        assert torch.equal(fk.distance_correction(view, labels, codes19), want), name
    for name, view in layouts(labels):
        assert torch.equal(fk.distance_correction(x, view, codes19), want), name
    expanded = fk.distance_correction(x[:1, :, :1].expand(2, -1, 7, -1), labels, codes19)
    assert torch.equal(expanded, fk.distance_correction(x[:1, :, :1].repeat(2, 1, 7, 1), labels, codes19))


def test_max_norm_caps_and_keeps_the_direction(backend, codes150):
    x, _, labels, _ = image_batch(codes150.centroids)
    free = fk.distance_correction(x, labels, codes150)
    capped = fk.distance_correction(x, labels, codes150, max_norm=0.5)
    norm = free.norm(dim=1, keepdim=True)
    assert (norm > 0.5).any() and (norm < 0.5).any()
    torch.testing.assert_close(capped, free * (0.5 / norm.clamp_min(0.5)), rtol=1e-5, atol=1e-7)


def test_nan_stays_in_its_pixel_and_ignored_pixels_are_zero(backend, codes19):
    x, _, labels, _ = image_batch(codes19.centroids, ignored=0)
    want = fk.distance_correction(x, labels, codes19)
    x[0, 1, 2, 3] = torch.nan
    x[1, 0, 0, 0] = torch.nan
    labels[1, 0, 0] = 255
    got = fk.distance_correction(x, labels, codes19)
    assert got[0, :, 2, 3].isnan().all() and not got[1, :, 0, 0].any()
    same = torch.ones_like(labels, dtype=torch.bool)
    same[0, 2, 3] = same[1, 0, 0] = False
    # A NaN makes its block use the general formula, so the other pixels agree only to rounding.
    torch.testing.assert_close(got.movedim(1, -1)[same], want.movedim(1, -1)[same], rtol=1e-4, atol=1e-4)
