"""Tensors with elements more than 2^32 apart. Their memory is reserved but hardly touched."""

import torch

import flowseg_kernels as fk

from ...support.samples import image_batch

# Truncated to 32 bits this offset is 24, which is inside the tensor: a truncated offset gives a wrong number, not a crash.
FAR = 2**32 + 24


def far_apart(x):
    """Return x (2, ...) with its two entries FAR elements apart."""
    memory = torch.empty(FAR + x[0].numel(), dtype=x.dtype)
    view = memory.as_strided(x.shape, (FAR, *x[0].contiguous().stride()))
    view.copy_(x)
    return view


def test_offsets_beyond_32_bits(backend, codes19):
    x, source, labels, t = image_batch(codes19.centroids, 2, 5, 9, dtype=torch.bfloat16)
    labels = labels.to(torch.uint8)

    def every_op(x, source, labels):
        x = x.detach().requires_grad_()
        loss = fk.flow_loss(x, source, labels, t, codes19)
        return (
            loss,
            torch.autograd.grad(loss, x)[0],
            fk.flow_interpolate(source, labels, t, codes19),
            fk.distance_correction(x, labels, codes19),
            fk.nearest_centroid(x, codes19),
            fk.decode_confusion(x, labels, codes19),
            fk.class_probabilities(x.detach(), codes19),
            *fk.top_classes(x.detach(), codes19, 3),
        )

    want = every_op(x, source, labels)
    for got in (every_op(far_apart(x), source, labels), every_op(x, far_apart(source), far_apart(labels))):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_pixels_of_a_field_beyond_32_bits(backend):
    x, weights = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 1, 2 * 16 * 16)
    embed, norms, out = torch.randn(16, 3 + 16), torch.ones(2, 16), torch.randn(3, 16)
    bias, out_bias = torch.zeros(16), torch.zeros(3)

    def run(x):
        x = x.detach().requires_grad_()
        y = fk.neural_field(x, weights, embed, bias, norms[:1], norms[1], out, out_bias, patch_size=4, mlp_ratio=1)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    for got, want in zip(run(far_apart(x)), run(x)):
        assert torch.equal(got, want)
