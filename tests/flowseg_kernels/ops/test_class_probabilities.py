"""class_probabilities and top_classes."""

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.ops.class_probabilities.reference import FORMS
from flowseg_kernels.ops.distance_correction.reference import TRANSFORMS
from flowseg_kernels.runtime.triton import INTERPRETED

from ...support.samples import FLOAT_DTYPES, LABEL_DTYPES, image_batch, largest_error, layouts, logits_and_slope


def plain(x, mu, eps, tau=1.0, transform="neg_log", form="probabilities", dtype=torch.float64):
    """The formula in plain PyTorch, in `dtype`."""
    d = (x.to(dtype)[:, None] - mu.to(dtype)[None, :, :, None, None]).square().sum(2)
    logits = logits_and_slope(d, eps, transform)[0] / tau
    return {"probabilities": torch.softmax, "log_probabilities": torch.log_softmax, "logits": lambda v, _: v}[form](
        logits, 1
    )


def number_of_classes(backend, request, classes, few):
    """A number of classes, but `few` for interpreted Triton kernels: the interpreter takes milliseconds per class."""
    slow = backend == "triton" and INTERPRETED and not request.config.getoption("--every-variant")
    return few if slow else classes


def test_two_classes_on_a_line_by_hand(backend):
    # x = 0.5 between codes 0 and 2, eps = 0.75: d = (0.25, 2.25), 1 / (d + eps) = (1, 1/3), p = (3/4, 1/4).
    x, mu = torch.tensor([[[[0.5]]]]), torch.tensor([[0.0], [2.0]])
    p = fk.class_probabilities(x, mu, eps=0.75)
    torch.testing.assert_close(p.flatten(), torch.tensor([0.75, 0.25]))
    logits = fk.class_probabilities(x, mu, eps=0.75, form="logits")
    torch.testing.assert_close(logits.flatten(), -torch.tensor([1.0, 3.0]).log())
    labels, best = fk.top_classes(1.5 + x, mu, 2, eps=0.75)
    assert labels.flatten().tolist() == [1, 0]
    torch.testing.assert_close(best.flatten(), torch.tensor([4.75 / 5.5, 0.75 / 5.5]))


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 11, 16])
def test_equals_the_formula(backend, transform, tau, channels):
    mu = fk.kronecker_centroids(23, channels, dtype=torch.float64)
    x, _, _, _ = image_batch(mu, dtype=torch.float64)
    options = {"temperature": tau, "eps": 0.05, "transform": transform}
    for form in FORMS:
        got = fk.class_probabilities(x, mu, form=form, **options)
        assert got.is_contiguous() and got.dtype == torch.float64
        torch.testing.assert_close(got, plain(x, mu, 0.05, tau, transform, form), rtol=1e-9, atol=1e-12)
    want = plain(x, mu, 0.05, tau, transform).sort(1, descending=True)
    labels, p = fk.top_classes(x, mu, 5, **options)
    assert torch.equal(labels, want.indices[:, :5])
    torch.testing.assert_close(p, want.values[:, :5], rtol=1e-9, atol=1e-12)


@pytest.mark.many_forms(7)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("spread", [0.3, 1e-2, 1e-5])
@pytest.mark.parametrize("channels", [3, 8])
def test_fp32_error_is_at_most_twice_plain_pytorch(backend, transform, tau, spread, channels, request):
    book = fk.Codebook(fk.kronecker_centroids(number_of_classes(backend, request, 150, 20), channels))
    x, _, _, _ = image_batch(book.centroids, 1, 17, 31, spread)
    options = {"eps": book.default_eps, "tau": tau, "transform": transform}
    for form in FORMS:
        exact = plain(x, book.centroids, form=form, **options)
        single = plain(x, book.centroids, form=form, dtype=torch.float32, **options)
        got = fk.class_probabilities(x, book, form=form, temperature=tau, transform=transform)
        floor = 2 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert largest_error(got, exact) <= max(2 * largest_error(single, exact), floor), form
    exact, single = (plain(x, book.centroids, dtype=dtype, **options) for dtype in (torch.float64, torch.float32))
    labels, p = fk.top_classes(x, book, 6, temperature=tau, transform=transform)
    floor = 2 * torch.finfo(torch.float32).eps * float(exact.max())
    assert largest_error(p, exact.gather(1, labels)) <= max(2 * largest_error(single, exact), floor)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 31, 33, 300])
@pytest.mark.parametrize("k", [1, 3, 4, 5, 8, 9, 16, 17])
def test_the_kept_classes_are_the_nearest_ones(backend, classes, k, request):
    classes = number_of_classes(backend, request, classes, min(classes, 35))
    if k > classes:
        with pytest.raises(ValueError, match=rf"k: wanted 1 to {classes}, the number of classes; got {k}"):
            fk.top_classes(torch.zeros(1, 3, 2, 2), torch.zeros(classes, 3), k, eps=1.0, ignore_index=-1)
        return
    book = fk.Codebook(fk.kronecker_centroids(classes, 3), ignore_index=-1)
    x = torch.randn(1, 3, 9, 31)
    labels, p = fk.top_classes(x, book, k)
    assert labels.shape == p.shape == (1, k, 9, 31) and labels.is_contiguous() and p.is_contiguous()
    assert torch.equal(labels[:, 0], fk.nearest_centroid(x, book))
    assert (p[:, 1:] <= p[:, :-1]).all() and (labels.sort(1).values.diff(dim=1) > 0).all()
    everything = fk.class_probabilities(x, book)
    torch.testing.assert_close(p, everything.gather(1, labels), rtol=2e-6, atol=0)
    # No class that was left out is more probable, beyond rounding.
    rest = everything.scatter(1, labels, 0.0)
    assert (rest.amax(1) <= p[:, -1] * (1 + 1e-6)).all()
    torch.testing.assert_close(p.sum(1) + rest.sum(1), torch.ones_like(p[:, 0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("transform, tau", [("neg_log", 1.0), ("neg_sq", 0.7)])
def test_ties_go_to_the_lowest_index(backend, transform, tau):
    # Powers of two make every distance exact, so ties are real ties.
    mu = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [1, 0, 0]])
    steps = torch.linspace(-1.5, 1.5, 13)
    x = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 13, 169)
    d = (x.double()[:, None] - mu.double()[None, :, :, None, None]).square().sum(2)
    want = d.sort(dim=1, stable=True).indices
    for k in (1, 4, 6, 7):
        labels, _ = fk.top_classes(x, mu, k, eps=0.125, transform=transform, temperature=tau)
        assert torch.equal(labels, want[:, :k])


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("transform, tau", [("neg_log", 1.0), ("neg_sq", 0.7)])
@pytest.mark.parametrize("channels", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_decides_near_ties_as_in_nearest_centroid(backend, transform, tau, channels, dtype):
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("a GPU's compiler chooses the multiply-adds of fp64")
    # Halfway between a code and its nearest other one both are as near, up to rounding.
    mu = fk.kronecker_centroids(60, channels, dtype=dtype)
    d = torch.cdist(mu, mu).fill_diagonal_(torch.inf)
    x = ((mu + mu[d.argmin(1)]) / 2).T.reshape(1, channels, 6, 10)
    x = torch.cat([x + j * torch.finfo(dtype).eps for j in range(-4, 5)])
    labels, _ = fk.top_classes(x, mu, 2, eps=0.1, transform=transform, temperature=tau)
    assert torch.equal(labels[:, 0], fk.nearest_centroid(x, mu))
    assert torch.equal(labels[:, 0], fk.nearest_centroid(x, mu, return_margin=True)[0])


@pytest.mark.parametrize("classes", [257, 3000])
def test_sums_stay_accurate_for_many_classes(backend, classes, request):
    classes = number_of_classes(backend, request, classes, 70)
    book = fk.Codebook(fk.kronecker_centroids(classes, 8), ignore_index=-1)
    x = book.encode(torch.randint(0, classes, (1, 4, 17))) + 0.05 * torch.randn(1, 8, 4, 17)
    exact = plain(x, book.centroids, book.default_eps)
    torch.testing.assert_close(fk.class_probabilities(x, book).double(), exact, rtol=4e-6, atol=0)
    labels, p = fk.top_classes(x, book, 8)
    torch.testing.assert_close(p.double(), exact.gather(1, labels), rtol=4e-6, atol=0)


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtypes_strides_and_label_dtypes(backend, dtype, codes19):
    x, _, _, _ = image_batch(codes19.centroids, 2, 7, 24, dtype=dtype)
    everything, (labels, p) = fk.class_probabilities(x, codes19), fk.top_classes(x, codes19, 3)
    assert everything.dtype == p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        everything.double(), plain(x, codes19.centroids, codes19.default_eps), rtol=1e-5, atol=1e-7
    )
    for out_dtype in LABEL_DTYPES:
        found = fk.top_classes(x, codes19, 3, out_dtype=out_dtype)
        assert found[0].dtype == out_dtype and torch.equal(found[0].long(), labels) and torch.equal(found[1], p)
    for name, view in layouts(x):
        assert torch.equal(fk.class_probabilities(view, codes19), everything), name
        found = fk.top_classes(view, codes19, 3)
        assert torch.equal(found[0], labels) and torch.equal(found[1], p), name
    expanded = x[:1, :, :1].expand(2, -1, 7, -1)
    repeated = x[:1, :, :1].repeat(2, 1, 7, 1)
    assert torch.equal(fk.class_probabilities(expanded, codes19), fk.class_probabilities(repeated, codes19))


@pytest.mark.many_forms(2)
@pytest.mark.parametrize("transform, tau", [("neg_log", 1.0), ("neg_log", 2.0), ("neg_sq", 1.0), ("inverse", 1.0)])
def test_nan_and_infinity_stay_in_their_pixel(backend, transform, tau, codes19):
    x, _, _, _ = image_batch(codes19.centroids, 1, 5, 60)
    options = {"transform": transform, "temperature": tau}
    want = fk.class_probabilities(x, codes19, **options)
    x[0, 1, 0, 7], x[0, 2, 4, 59], x[0, 0, 3, 3] = torch.nan, torch.inf, 1e20
    lost = torch.zeros(1, 5, 60, dtype=torch.bool)
    lost[0, 0, 7] = lost[0, 4, 59] = lost[0, 3, 3] = True
    for form in FORMS:
        got = fk.class_probabilities(x, codes19, form=form, **options)
        assert got.movedim(1, -1)[lost].isnan().all()
        assert not got.movedim(1, -1)[~lost].isnan().any()
    got = fk.class_probabilities(x, codes19, **options)
    assert torch.equal(got.movedim(1, -1)[~lost], want.movedim(1, -1)[~lost])
    labels, p = fk.top_classes(x, codes19, 3, out_dtype=torch.uint8, **options)
    assert p.movedim(1, -1)[lost].isnan().all() and not p.movedim(1, -1)[~lost].isnan().any()
    assert (labels[0, :, 0, 7] == 255).all() and (labels == 255).sum() == 3
    assert labels[0, :, 4, 59].tolist() == labels[0, :, 3, 3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "scale, eps", [(1e-30, 1e-2), (1e3, 1e-2), (1e6, 1e-2), (1e12, 1.0), (1.0, 1e-14), (1.0, 1e-30)]
)
def test_far_points_and_tiny_eps(backend, scale, eps):
    mu = fk.kronecker_centroids(40, 3)
    x = torch.randn(1, 3, 12, 15) * scale
    exact, single = (plain(x, mu, eps, dtype=dtype) for dtype in (torch.float64, torch.float32))
    got = fk.class_probabilities(x, mu, eps=eps)
    assert largest_error(got, exact) <= max(2 * largest_error(single, exact), 1e-6)
    labels, p = fk.top_classes(x, mu, 4, eps=eps)
    assert largest_error(p, exact.gather(1, labels)) <= max(2 * largest_error(single, exact), 1e-6)


def test_numbers_may_be_tensors(backend, codes19):
    x, _, _, _ = image_batch(codes19.centroids)
    tau, eps = torch.tensor(0.5), torch.tensor(0.03)
    for call in (fk.class_probabilities, lambda *a, **o: fk.top_classes(*a, 2, **o)[1]):
        assert torch.equal(
            call(x, codes19, temperature=tau, eps=eps), call(x, codes19, temperature=0.5, eps=float(eps))
        )


def test_gradients_raise_by_name(backend, codes19):
    x, _, _, _ = image_batch(codes19.centroids)
    x.requires_grad_()
    labels, p = fk.top_classes(x, codes19, 2)
    assert not labels.requires_grad
    for name, out in (("class_probabilities", fk.class_probabilities(x, codes19)), ("top_classes", p)):
        with pytest.raises(NotImplementedError, match=f"flowseg::{name} has no derivative"):
            out.sum().backward()


def test_bad_arguments_are_named(codes19):
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="form: wanted one of 'probabilities', 'log_probabilities', 'logits'; got 'p'"):
        fk.class_probabilities(x, codes19, form="p")
    with pytest.raises(ValueError, match="transform: wanted one of"):
        fk.top_classes(x, codes19, 2, transform="log")
    with pytest.raises(TypeError, match="k: wanted an int; got float"):
        fk.top_classes(x, codes19, 2.0)
    with pytest.raises(ValueError, match="eps: wanted a number above 0 for bare centroids"):
        fk.top_classes(x, codes19.centroids, 2)
    with pytest.raises(ValueError, match="out_dtype: wanted one that holds classes up to 299"):
        fk.top_classes(x, torch.zeros(300, 3), 2, eps=1.0, out_dtype=torch.uint8)
