import itertools

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.ops.distance_correction.reference import potential

from ...support.samples import FLOAT_DTYPES, image_batch, largest_error, layouts, naive_loss

OPTIONS = list(
    itertools.product(("velocity", "endpoint"), ("velocity", "endpoint"), ("static", "annealed"), (0.0, 0.7))
)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("predicts, space, schedule, weight", OPTIONS)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_value_and_gradient_equal_plain_autograd_in_fp64(backend, predicts, space, schedule, weight, channels):
    mu = fk.kronecker_centroids(21, channels, dtype=torch.float64)
    x, source, labels, _ = image_batch(mu, dtype=torch.float64)
    t = torch.tensor([0.3, 0.99], dtype=torch.float64)  # the second time is beyond 1 - t_min
    x.requires_grad_()
    want = naive_loss(
        x, source, labels, t, mu, predicts=predicts, space=space, weight=weight, schedule=schedule, eps=0.02
    )
    got = fk.flow_loss(
        x, source, labels, t, mu,
        predicts=predicts, loss_space=space, correction_weight=weight, schedule=schedule, eps=0.02,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_changing_a_gradient_in_place_does_not_change_the_next_one(backend, codes19, dtype, reduction):
    x, source, labels, t = image_batch(codes19.centroids, dtype=dtype)
    x.requires_grad_()
    loss = fk.flow_loss(x, source, labels, t, codes19, reduction=reduction)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    want = first.clone()
    first.zero_()
    for _ in range(2):
        x.grad = None
        loss.backward(retain_graph=True)
        assert torch.equal(x.grad, want)
        x.grad.zero_()
    loss.backward()
    assert torch.equal(x.grad, want)
    (doubled,) = torch.autograd.grad(2 * fk.flow_loss(x, source, labels, t, codes19, reduction=reduction), x)
    torch.testing.assert_close(doubled, 2 * want)


@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_of_incoming_gradients(backend, codes19, keep):
    """torch.autograd.functional.jacobian(vectorize=True) passes such a batch. The residual must not become one of its gradients."""
    x, source, labels, t = image_batch(codes19.centroids)
    x = x.float().requires_grad_()
    loss = fk.flow_loss(x, source.float(), labels, t, codes19)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    want = want.clone()
    factors = torch.tensor([1.0, 3.0])
    (found,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=keep)
    torch.testing.assert_close(found, factors.view(2, 1, 1, 1, 1) * want)


@pytest.mark.parametrize("transform", ["neg_log", "neg_sq", "neg_dist", "inverse"])
def test_the_correction_is_an_auxiliary_cross_entropy(backend, transform):
    """grad of the corrected loss = grad of |v - v_gt|^2 + 2 lambda w / (1-t) Phi(xhat): see docs/ops/flow_loss.md."""
    mu = fk.kronecker_centroids(12, 3, dtype=torch.float64)
    v, source, labels, t = image_batch(mu, dtype=torch.float64)
    t = 0.8 * t
    v.requires_grad_()
    options = {"temperature": 1.3, "eps": 0.05, "transform": transform}
    loss = fk.flow_loss(v, source, labels, t, mu, correction_weight=0.6, **options)
    vanilla = fk.flow_loss(v, source, labels, t, mu, correction_weight=0, reduction="none")
    xt = fk.flow_interpolate(source, labels, t, mu)
    phi = potential(xt + (1 - t)[:, None, None, None] * v, labels, mu, 1.3, 0.05, transform, 255)
    weight = (2 * 0.6 / (1 - t))[:, None, None] / 3  # the squared error is a mean over the three channels
    auxiliary = (vanilla + weight * phi).sum() / (labels != 255).sum()
    torch.testing.assert_close(
        torch.autograd.grad(loss, v)[0], torch.autograd.grad(auxiliary, v)[0], rtol=1e-8, atol=1e-11
    )


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("predicts", ["velocity", "endpoint"])
@pytest.mark.parametrize(
    "tau, spread", [(1.0, 0.2), (1.0, 1e-2), (1.0, 1e-4), (0.5, 1e-2), (2.0, 1e-2), (0.5, 1e-4), (2.0, 1e-4)]
)
def test_error_is_at_most_twice_plain_pytorch(backend, dtype, predicts, tau, spread, codes150):
    """`spread` is the distance of an endpoint prediction from its code. A velocity's endpoint also varies with the source."""
    x, source, labels, t = image_batch(codes150.centroids, 2, 20, 24, spread, dtype)
    options = {
        "predicts": predicts,
        "space": predicts,
        "weight": 1.0,
        "schedule": "static",
        "eps": codes150.default_eps,
        "tau": tau,
    }
    results = []
    for each in (torch.float64, dtype):
        leaf = x.to(each).requires_grad_()
        loss = naive_loss(leaf, source.to(each), labels, t, codes150.centroids, **options)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    leaf = x.clone().requires_grad_()
    loss = fk.flow_loss(leaf, source, labels, t, codes150, predicts=predicts, temperature=tau)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    exact, plain = results
    assert largest_error(loss, exact[0]) <= max(2 * largest_error(plain[0], exact[0]), 2e-7 * float(exact[0]))
    floor = torch.finfo(dtype).eps * float(exact[1].abs().max())
    assert largest_error(grad, exact[1]) <= max(2 * largest_error(plain[1], exact[1]), floor)


def test_reductions_agree(backend, codes19):
    x, source, labels, t = image_batch(codes19.centroids)
    each = fk.flow_loss(x, source, labels, t, codes19, reduction="none")
    assert each.shape == labels.shape and not each[labels == 255].any()
    total = fk.flow_loss(x, source, labels, t, codes19, reduction="sum")
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(fk.flow_loss(x, source, labels, t, codes19), total / (labels != 255).sum())


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vanilla_gradcheck(backend, reduction):
    mu = fk.kronecker_centroids(5, 3, dtype=torch.float64)
    x, source, labels, t = image_batch(mu, 2, 2, 3, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: fk.flow_loss(v, source, labels, t, mu, correction_weight=0, reduction=reduction), (x,)
    )


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides_give_the_same(backend, dtype, reduction, codes19):
    x, source, labels, t = image_batch(codes19.centroids, 2, 5, 24, dtype=dtype)

    def run(x, source, labels, weight):
        leaf = x.detach().requires_grad_()
        loss = fk.flow_loss(leaf, source, labels, t, codes19, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, leaf, weight)
        return loss.detach(), grad

    ones = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight = (torch.arange(labels.numel()).reshape(labels.shape) / 100).to(ones.dtype) if reduction == "none" else ones
    want = run(x, source, labels, weight)
    views = [(n, v, source, labels, weight) for n, v in layouts(x)]
    views += [(n, x, v, labels, weight) for n, v in layouts(source)] + [
        (n, x, source, v, weight) for n, v in layouts(labels)
    ]
    if reduction == "none":
        views += [(n, x, source, labels, v) for n, v in layouts(weight)]
    for name, *view in views:
        got = run(*view)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), name


def test_source_may_have_another_dtype(backend, codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    loss = fk.flow_loss(x.bfloat16(), source, labels, t, codes150)
    torch.testing.assert_close(loss, fk.flow_loss(x.bfloat16().float(), source, labels, t, codes150), rtol=1e-6, atol=0)


def test_fp16_gradients_do_not_vanish_in_large_batches(backend):
    """1 / number of pixels underflows in fp16, so it must be multiplied by the loss scale in fp32."""
    codes2 = fk.Codebook(torch.tensor([[-0.5, 0.0, 0.5], [0.5, 0.5, -0.5]]))
    x, source, labels, t = image_batch(codes2.centroids, 2, 400, 500, dtype=torch.float16, ignored=0)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(fk.flow_loss(x, source, labels, t, codes2) * 2.0**16, x)
    assert grad.abs().max() > 0.1


def test_all_ignored_gives_zero(backend, codes19):
    x, source, labels, t = image_batch(codes19.centroids)
    x[0, 0, 0, 0] = torch.nan  # even if the prediction is NaN
    x.requires_grad_()
    labels = torch.full_like(labels, 255)
    for reduction in ("mean", "sum"):
        loss = fk.flow_loss(x, source, labels, t, codes19, reduction=reduction)
        assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_nan_in_a_valid_pixel_is_seen(backend, codes19):
    x, source, labels, t = image_batch(codes19.centroids, ignored=0)
    x[1, 2, 3, 4] = torch.nan
    assert fk.flow_loss(x, source, labels, t, codes19).isnan()


def test_bitwise_repeatable_over_threads(backend, codes19):
    x, source, labels, t = image_batch(codes19.centroids, 2, 60, 150)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(fk.flow_loss(x, source, labels, t, codes19))
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":
        assert results[0] == results[1] == results[2]
    torch.testing.assert_close(results[0], results[2])


def test_module_keeps_its_options(backend, codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    module = fk.FlowLoss(codes150, predicts="endpoint", correction_weight=0.5)
    want = fk.flow_loss(x, source, labels, t, codes150, predicts="endpoint", correction_weight=0.5)
    assert torch.equal(module(x, source, labels, t), want)
    assert "codebook.centroids" in module.state_dict() and "predicts='endpoint'" in repr(module)
