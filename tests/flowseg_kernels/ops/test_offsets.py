"""Tensors whose elements lie more than 2^32 apart, in memory of which next to nothing is touched."""

import torch

import flowseg_kernels as fk

from ..samples import image_batch

# In 32 bits it is 24: a wrong number where the memory is ours, not a crash.
FAR = 2**32 + 24


def far_apart(x):
    """x (2, ...) with its two entries FAR elements from each other."""
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
        )

    want = every_op(x, source, labels)
    for got in (every_op(far_apart(x), source, labels), every_op(x, far_apart(source), far_apart(labels))):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
