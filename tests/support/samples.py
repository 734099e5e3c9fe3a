"""Inputs for the tests of the ops, and independent plain formulas to compare with."""

import torch

from flowseg_kernels.decode_tables import decode_tables as tables_on
from flowseg_kernels.derived import derived_from

LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def image_batch(codes, batch=2, height=9, width=13, spread=0.3, dtype=torch.float32, ignored=0.1):
    """A prediction near the codes, a source, labels (the fraction `ignored` of them 255) and times."""
    k, c = codes.shape
    labels = torch.randint(0, k, (batch, height, width))
    x = codes[labels].movedim(-1, 1).double() + spread * torch.randn(batch, c, height, width, dtype=torch.float64)
    labels = torch.where(torch.rand(labels.shape) < ignored, 255, labels)
    source = torch.rand(batch, c, height, width, dtype=torch.float64) * 2 - 1
    return x.to(dtype), source.to(dtype), labels, torch.rand(batch, dtype=torch.float64)


def decode_tables(centroids, margin=False):
    """The decoding tables of (K, C) codes as kernels take them: (tensors, low, scale)."""
    return tables_on(derived_from(centroids), centroids.device, margin)


def layouts(x):
    """Yield (name, tensor): the same values in each memory layout that callers may use."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2 + 1, dtype=x.dtype)
    wide[..., 1::2] = x
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.flatten()
    last = list(range(x.ndim))
    yield "contiguous", x.contiguous()
    yield "channels_last", x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "every_second", wide[..., 1::2]
    yield "offset_by_one", flat[1:].view(x.shape)
    yield "reversed_dims", x.permute(*last[::-1]).contiguous().permute(*last[::-1])


def logits_and_slope(d, eps, transform):
    """T(d) and T'(d) of a transform (docs/method.md)."""
    return {
        "neg_log": lambda: (-(d + eps).log(), -1 / (d + eps)),
        "neg_sq": lambda: (-d, -torch.ones_like(d)),
        "neg_dist": lambda: (-(d + eps).sqrt(), -0.5 / (d + eps).sqrt()),
        "inverse": lambda: (1 / (d + eps), -1 / (d + eps) ** 2),
    }[transform]()


def naive_correction(x, labels, mu, eps, tau=1.0, transform="neg_log", ignore=255):
    """The gradient of the cross-entropy on distances in plain PyTorch, computed in the dtype of x."""
    diff = x[:, None] - mu.to(x.dtype)[None, :, :, None, None]
    d = diff.square().sum(2)
    logits, slope = logits_and_slope(d, eps, transform)
    p = torch.softmax(logits / tau, 1)
    valid = labels != ignore
    hot = torch.nn.functional.one_hot(torch.where(valid, labels, 0).long(), mu.shape[0]).movedim(-1, 1).to(x.dtype)
    grad = (2 / tau) * (((p - hot) * slope)[:, :, None] * diff).sum(1)
    return torch.where(valid[:, None], grad, 0)


def exact_correction(x, labels, mu, eps, tau=1.0, transform="neg_log", ignore=255):
    """naive_correction in fp64. It sums 1 - p_y from the other classes: near a centroid the subtraction cancels even in fp64."""
    x, mu = x.double(), mu.double()
    diff = x[:, None] - mu[None, :, :, None, None]
    d = diff.square().sum(2)
    logits, slope = logits_and_slope(d, eps, transform)
    valid = labels != ignore
    hot = torch.nn.functional.one_hot(torch.where(valid, labels, 0).long(), mu.shape[0]).movedim(-1, 1).bool()
    rivals = torch.softmax(logits / tau, 1).masked_fill(hot, 0)
    excess = torch.where(hot, -rivals.sum(1, keepdim=True), rivals)
    grad = (2 / tau) * ((excess * slope)[:, :, None] * diff).sum(1)
    return torch.where(valid[:, None], grad, 0)


def naive_loss(
    prediction, source, labels, t, mu, *, predicts, space, weight, schedule, eps, tau=1.0, t_min=0.05, ignore=255
):
    """The loss (docs/method.md) in plain PyTorch, with a detached target; autograd gives its gradient."""
    valid = labels != ignore
    x1 = mu.to(prediction.dtype)[torch.where(valid, labels, 0).long()].movedim(-1, 1)
    time = t.to(prediction.dtype)[:, None, None, None]
    xt = (1 - time) * source + time * x1
    xhat = xt + (1 - time) * prediction if predicts == "velocity" else prediction
    g = naive_correction(xhat.detach(), labels, mu, eps, tau) * weight * ((1 - time) if schedule == "annealed" else 1)
    if space == "velocity":
        if predicts == "velocity":
            error = prediction - (x1 - source - g)
        else:
            error = (prediction - x1) / (1 - time).clamp_min(t_min) + g
    else:
        error = xhat - (x1 - g)
    return (error.square().mean(1) * valid).sum() / valid.sum().clamp_min(1)


def largest_error(got, want):
    return float((got.detach().double() - want.detach().double()).abs().max())
