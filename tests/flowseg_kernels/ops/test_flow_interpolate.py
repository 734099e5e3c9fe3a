import pytest
import torch

import flowseg_kernels as fk

from ...support.samples import FLOAT_DTYPES, image_batch, largest_error, layouts


def test_by_hand(backend):
    source = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    labels = torch.tensor([[[0, 1, 255]]])
    got = fk.flow_interpolate(source, labels, torch.tensor([0.25]), torch.tensor([[-1.0], [10.0]]))
    assert got.flatten().tolist() == [0.5, 4.0, 3.0]


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("channels", [1, 3, 7, 16])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_equals_the_formula_in_fp64(backend, channels, dtype):
    mu = fk.kronecker_centroids(30, channels)
    _, source, labels, t = image_batch(mu, dtype=dtype)
    got = fk.flow_interpolate(source, labels, t, mu)
    codes = mu.double()[torch.where(labels == 255, 0, labels)].movedim(-1, 1)
    time = t[:, None, None, None]
    want = torch.where((labels == 255)[:, None], source.double(), (1 - time) * source.double() + time * codes)
    plain = ((1 - time.to(dtype)) * source + time.to(dtype) * codes.to(dtype)).where((labels != 255)[:, None], source)
    assert got.dtype == dtype and got.is_contiguous()
    assert largest_error(got, want) <= max(2 * largest_error(plain, want), 2 * torch.finfo(dtype).eps)


def test_ends_are_the_source_and_the_code(backend, codes150):
    _, source, labels, _ = image_batch(codes150.centroids, ignored=0)
    assert torch.equal(fk.flow_interpolate(source, labels, torch.zeros(2), codes150), source)
    torch.testing.assert_close(fk.flow_interpolate(source, labels, torch.ones(2), codes150), codes150.encode(labels))


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_gradients(backend, channels):
    mu = fk.kronecker_centroids(9, channels, dtype=torch.float64)
    _, source, labels, t = image_batch(mu, 2, 2, 2, dtype=torch.float64)
    source.requires_grad_()
    t.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, u: fk.flow_interpolate(s, labels, u, mu), (source, t))


def test_only_the_wanted_gradients_and_any_grad_strides(backend, codes19):
    _, source, labels, t = image_batch(codes19.centroids)
    source.requires_grad_()
    (want,) = torch.autograd.grad((fk.flow_interpolate(source, labels, t, codes19) * 3).sum(), source)
    out = fk.flow_interpolate(source, labels, t, codes19)
    for grad in (torch.full((1, 1, 1, 1), 3.0).expand(out.shape), *(v for _, v in layouts(torch.full_like(out, 3.0)))):
        (got,) = torch.autograd.grad(out, source, grad, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    t.requires_grad_()
    (by_time,) = torch.autograd.grad(fk.flow_interpolate(source.detach(), labels, t, codes19).sum(), t)
    assert by_time.shape == t.shape and by_time.dtype == t.dtype
