"""torch.func: grad, vjp and jacrev equal torch.autograd, vmap equals a loop; any other transform is an error that names the op."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import flowseg_kernels as fk

from .steps import EveryOp, batch


def predictions(codes, count=4):
    source, labels, t = batch(codes, 2 * count)
    x = torch.randn_like(source)
    return [v.unflatten(0, (count, 2)) for v in (x, source, labels, t)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad_and_vjp_equal_autograd(backend, codes19, reduction):
    x, source, labels, t = (v[0] for v in predictions(codes19))

    def loss(x):
        return fk.flow_loss(x, source, labels, t, codes19, reduction=reduction)

    want = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    assert torch.equal(grad(loss)(x.detach()), want)
    value, back = vjp(loss, x.detach())
    assert torch.equal(value, loss(x)) and torch.equal(back(torch.ones(()))[0], want)

    def point(source, t):
        return fk.flow_interpolate(source, labels, t, codes19).square().sum()

    leaves = source.requires_grad_(), t.requires_grad_()
    want = torch.autograd.grad(point(*leaves), leaves)
    for a, b in zip(grad(point, argnums=(0, 1))(source.detach(), t.detach()), want):
        torch.testing.assert_close(a, b)


def test_vmap_of_every_per_pixel_op_is_a_loop(backend, codes19):
    inputs = predictions(codes19)

    def each(x, source, labels, t):
        return (
            fk.flow_loss(x, source, labels, t, codes19),
            fk.flow_loss(x, source, labels, t, codes19, reduction="none", correction_weight=0.0),
            fk.flow_interpolate(source, labels, t, codes19),
            fk.distance_correction(x, labels, codes19),
            *fk.nearest_centroid(x, codes19, return_distance=True, return_margin=True),
            fk.decode_confusion(x, labels, codes19),
        )

    looped = [each(*(v[i] for v in inputs)) for i in range(4)]
    for got, want in zip(vmap(each)(*inputs), zip(*looped)):
        assert torch.equal(got, torch.stack(want))
    # Share labels and times, and batch the images along another dimension.
    x, source, labels, t = inputs
    got = vmap(each, in_dims=(2, 2, None, None), out_dims=0)(x.movedim(0, 2), source.movedim(0, 2), labels[0], t[0])
    for a, want in zip(got, zip(*(each(x[i], source[i], labels[0], t[0]) for i in range(4)))):
        assert torch.equal(a, torch.stack(want))


def test_vmap_over_other_tensors_than_the_op_takes(backend, codes19):
    x, source, labels, t = (v[0] for v in predictions(codes19))
    x.requires_grad_()
    losses = vmap(lambda weight: weight * fk.flow_loss(x, source, labels, t, codes19))(torch.tensor([1.0, 2.0]))
    want = torch.autograd.grad(3 * fk.flow_loss(x, source, labels, t, codes19), x)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), x), want)


def test_gradients_of_each_example(backend, codes19, patch_chunk):
    """vmap of grad over a network's parameters, as for gradient statistics or differential privacy, and grad of vmap."""
    step = EveryOp(codes19, patch_chunk=patch_chunk)
    parameters = dict(step.named_parameters())
    _, source, labels, t = predictions(codes19)

    def loss(parameters, *inputs):
        return functional_call(step, parameters, inputs)[0]

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, source, labels, t)
    for i in range(4):
        want = torch.autograd.grad(step(source[i], labels[i], t[i])[0], list(step.parameters()))
        for (name, got), expected in zip(each.items(), want):
            torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    summed = grad(lambda p: vmap(loss, in_dims=(None, 0, 0, 0))(p, source, labels, t).sum())(parameters)
    for name, got in summed.items():
        torch.testing.assert_close(got, each[name].sum(0), rtol=1e-4, atol=1e-3)


def test_jacrev_of_the_loss_of_each_pixel(backend, codes19):
    x, source, labels, t = (v[0, :1, ..., :2, :2] if v.ndim > 3 else v[0, :1] for v in predictions(codes19))
    labels = labels[..., :2, :2]

    def losses(x):
        return fk.flow_loss(x, source, labels, t, codes19, reduction="none")

    x.requires_grad_()
    want = torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in losses(x).flatten()])
    torch.testing.assert_close(jacrev(losses)(x.detach()).flatten(0, 2), want)


def test_the_correction_is_a_target_inside_grad_too(codes19):
    x, _, labels, _ = (v[0] for v in predictions(codes19))
    assert not grad(lambda x: fk.distance_correction(x, labels, codes19).sum())(x).any()


def test_compiled_transforms_are_right_or_an_error(codes19):
    """torch.compile decomposes the transform and calls the op without our Function. That must be an error, not zero gradients."""
    x, source, labels, t = (v[0] for v in predictions(codes19))

    def loss(x):
        return fk.flow_loss(x, source, labels, t, codes19)

    torch._dynamo.reset()
    try:
        got = torch.compile(grad(loss), backend="aot_eager")(x)
    except RuntimeError as error:
        assert "functorch transforms" in str(error)
    else:
        assert torch.equal(got, grad(loss)(x))


FORWARD = {
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "hessian": lambda f, x: hessian(f)(x),
    "jvp of grad": lambda f, x: jvp(grad(f), (x,), (x,)),
    "jvp of vmap": lambda f, x: jvp(vmap(lambda v: f(v[None])), (x,), (x,)),
}


@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_is_an_error_by_name(codes19, transform):
    x, source, labels, t = (v[0, :1] for v in predictions(codes19))
    calls = {
        "flow_loss": (lambda v: fk.flow_loss(v, source, labels, t, codes19), x),
        "flow_interpolate": (lambda v: fk.flow_interpolate(v, labels, t, codes19).sum(), source),
        "distance_correction": (lambda v: fk.distance_correction(v, labels, codes19).sum(), x),
    }
    for name, (call, value) in calls.items():
        with pytest.raises(NotImplementedError, match=rf"{name}(_bwd)?: forward-mode derivatives \(torch.func.jvp"):
            FORWARD[transform](call, value)


def test_second_derivatives_are_an_error_by_name(codes19):
    x, source, labels, t = (v[0] for v in predictions(codes19))
    loss = grad(lambda v: fk.flow_loss(v, source, labels, t, codes19))
    with pytest.raises(NotImplementedError, match="flowseg::flow_loss_bwd has no derivative"):
        grad(lambda v: loss(v).square().sum())(x)
