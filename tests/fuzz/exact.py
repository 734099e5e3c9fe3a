"""The formulas in fp64, each with a bound on the error of the same arithmetic in the compute dtype.

The bounds are a first-order forward error analysis. Every operation has a relative error of at most `u`; the error of a logit is
the error of its distance times the slope of the transform. The bounds are derived, not fitted to results.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..support.samples import logits_and_slope

#: Largest fp32 number, smallest normal one (below it a number loses digits), smallest subnormal one.
HUGE, TINY, SMALLEST = 3.4028234e38, 1.1754944e-38, 1.5e-45
#: Error per term of a sum in fp64.
ROUNDING = 2.3e-16


@dataclasses.dataclass
class Answer:
    """The expected result.

    value, bound: fp64; a result is right if |result - value| <= bound, before it is rounded to its dtype
    free:         numbers without a bound: an intermediate result overflows, or the rounding of the inputs decides the answer
    """

    value: Tensor
    bound: Tensor
    free: Tensor


def split_labels(labels: Tensor, classes: int, ignore: int) -> tuple[Tensor, Tensor]:
    y = labels.long()
    valid = (y != ignore) & (y >= 0) & (y < classes)
    return valid, torch.where(valid, y, 0)


def distances(x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Differences (B, K, C, H, W) and squared distances (B, K, H, W)."""
    diff = x[:, None] - mu[None, :, :, None, None]
    return diff, diff.square().sum(2)


def correction(
    x: Tensor, labels: Tensor, mu: Tensor, *, temperature: float, eps: float, transform: str, max_norm: float | None,
    ignore: int, u: float, slack: Tensor | None = None,
) -> Answer:  # fmt: skip
    """grad Phi, with 1 - p_y as the sum over the other classes. `slack` (B, C, H, W) bounds the error of x itself."""
    classes, channels = mu.shape
    valid, y = split_labels(labels, classes, ignore)
    single = u > 1e-10
    diff, d = distances(x, mu)
    size = diff.abs()
    hot = torch.zeros_like(d, dtype=torch.bool).scatter_(1, y[:, None], True)

    def gradient(diff, d):
        logits, slope = logits_and_slope(d, eps, transform)
        rivals = torch.softmax(logits / temperature, 1).masked_fill(hot, 0)
        own = (slope[:, :, None] * diff).gather(1, y[:, None, None].expand(-1, 1, *diff.shape[2:]))
        pull = slope[:, :, None] * diff
        return (
            (2 / temperature) * (rivals[:, :, None] * (pull - own)).sum(1),
            logits / temperature,
            slope,
            rivals,
            pull,
            own,
        )

    grad, logits, slope, rivals, pull, own = gradient(diff, d)
    d_off = (channels + 3) * u * d + (SMALLEST if single else 0)
    logit_off = (slope.abs() * d_off + 3 * u * logits.abs() * temperature + 2 * u) / temperature + u * logits.abs()
    nearest = logits.amax(1, keepdim=True)
    relative = (
        logit_off + logit_off.gather(1, logits.argmax(1, keepdim=True)) + 2 * u * (logits - nearest).abs() + 8 * u
    )
    sums = (min(classes, 32 + classes // 32) + 4) * u
    p = torch.softmax(logits, 1)
    relative = relative + (p * relative).sum(1, keepdim=True) + sums + (2 * channels + 12) * u
    weight = rivals * relative + (2e-38 if single else 0)
    if single:
        # Slopes below the normal range may be flushed to zero.
        weight = weight + (slope.abs() < TINY) * rivals
    bound = (2 / temperature) * (weight[:, :, None] * (pull.abs() + own.abs())).sum(1) + 4 * u * grad.abs() + SMALLEST

    biggest = d.amax(1)
    nan = x.isnan().any(1) | x.isinf().any(1)
    lost = x.square().sum(1) > HUGE * 1.01 if single else torch.zeros_like(nan)
    free = (relative.amax(1) > 0.3) & ~nan & ~lost
    if single:
        near_overflow = (torch.maximum(x.square().sum(1), biggest) > HUGE * 0.5) & ~lost
        free |= near_overflow | ((pull.abs().amax((1, 2)) > 1e18) | (slope.abs().amax(1) > 1e37))
    if slack is not None:
        steepest = (2 * slope.abs()[:, :, None] * size).amax((1, 2)) / temperature
        error = slack.amax(1)
        free |= (error * steepest > 0.05) | (error > 0.02 * (d.amin(1) + eps).sqrt())
        for c in range(channels):
            for sign in (1, -1):
                moved = diff.clone()
                moved[:, :, c] += sign * slack[:, None, c]
                bound = bound + (gradient(moved, moved.square().sum(2))[0] - grad).abs()
    if max_norm is not None:
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        grad = grad * (max_norm / norm.clamp_min(max_norm))
        # Projection onto a ball never increases the distance of two points.
        bound = torch.linalg.vector_norm(bound, dim=1, keepdim=True).expand_as(grad) + 8 * u * grad.abs()
    grad = grad.masked_fill((nan | lost)[:, None], torch.nan)
    inside = valid[:, None]
    return Answer(torch.where(inside, grad, 0), torch.where(inside, bound, 0), (free & valid)[:, None].expand_as(grad))


def probabilities(
    x: Tensor, mu: Tensor, *, temperature: float, eps: float, transform: str, form: str, u: float
) -> Answer:
    """Probabilities of all classes, their logarithms or logits, (B, K, H, W), as `form` says."""
    classes, channels = mu.shape
    single = u > 1e-10
    _, d = distances(x, mu)
    logits, slope = logits_and_slope(d, eps, transform)
    logits = logits / temperature
    d_off = (channels + 3) * u * d + (SMALLEST if single else 0)
    # The distance plus eps is rounded, then the transform, then the product with 1 / temperature.
    off = (slope.abs() * (d_off + u * (d + eps)) + 3 * u * logits.abs() * temperature + 2 * u) / temperature
    off = off + 2 * u * logits.abs()
    p = torch.softmax(logits, 1)
    gap = logits.amax(1, keepdim=True) - logits
    sums = (min(classes, 32 + classes // 32) + 4) * u
    mean = (p * off).sum(1, keepdim=True) + (p * gap).sum(1, keepdim=True) * 2 * u
    relative = off + mean + 2 * u * gap + 12 * u + sums
    if form == "logits":
        value, bound = logits, off
    elif form == "log_probabilities":
        value = torch.log_softmax(logits, 1)
        # The largest logit is added to the logarithm of the sum, and the sum is subtracted from the logit.
        bound = relative + 3 * u * (logits.abs() + logits.abs().amax(1, keepdim=True) + value.abs())
    else:
        # Exponentials below exp(-87) are 0 in fp32.
        value, bound = p, p * torch.expm1(relative.clamp_max(10)) + (2e-38 if single else 0)
    norm = x.square().sum(1)
    lost = x.isnan().any(1) | norm.isinf() | (norm > HUGE if single else norm.isnan())
    free = (relative > 0.5).any(1) if form != "logits" else torch.zeros_like(lost)
    if single:
        # Near the largest fp32 number a square, a sum or a reciprocal may or may not overflow.
        free = free | (d.amax(1) > 1e37) | (logits.abs().amax(1) > 1e37) | (norm > 1e37)
    free = free & ~(lost & (norm > 2 * HUGE if single else lost)) & ~x.isnan().any(1)
    value = value.masked_fill(lost[:, None], torch.nan)
    return Answer(value, bound.nan_to_num(posinf=0), free[:, None].expand_as(value))


def interpolate(x0: Tensor, labels: Tensor, t: Tensor, mu: Tensor, ignore: int, u: float) -> Answer:
    valid, y = split_labels(labels, mu.shape[0], ignore)
    code = mu[y].movedim(-1, 1)
    time = t[:, None, None, None]
    moved = (1 - time) * x0 + time * code
    bound = 4 * u * ((1 - time) * x0.abs() + time * code.abs())
    inside = valid[:, None]
    value = torch.where(inside, moved, x0)
    return Answer(value, torch.where(inside, bound, 0).nan_to_num(), torch.zeros_like(value, dtype=torch.bool))


def interpolate_backward(grad: Tensor, x0: Tensor, labels: Tensor, t: Tensor, mu: Tensor, ignore: int, u: float):
    """Answers for the gradients of source and of t."""
    valid, y = split_labels(labels, mu.shape[0], ignore)
    inside = valid[:, None]
    time = t[:, None, None, None]
    by_source = torch.where(inside, (1 - time) * grad, grad)
    code = mu[y].movedim(-1, 1)
    slope = torch.where(inside, code - x0, 0)
    by_time = (grad * slope).sum((1, 2, 3))
    # The difference may round to zero, so the bound uses both absolute values.
    terms = grad[0].numel() if len(grad) else 0
    off = (4 * u + terms * ROUNDING) * (grad.abs() * torch.where(inside, code.abs() + x0.abs(), 0)).sum((1, 2, 3))
    no = torch.zeros_like
    return (
        Answer(by_source, 4 * u * by_source.abs(), no(by_source, dtype=torch.bool)),
        Answer(by_time, off.nan_to_num(), no(by_time, dtype=torch.bool) | ~off.isfinite() & ~by_time.isnan()),
    )


def loss(
    out: Tensor, x0: Tensor, labels: Tensor, t: Tensor, mu: Tensor, *, predicts: str, space: str, weight: float,
    schedule: str, t_min: float, ignore: int, u: float, **options,
) -> tuple[Answer, Answer, Tensor]:  # fmt: skip
    """Answers for the loss per pixel (B, H, W) and for the residual (B, C, H, W), and the mask of valid pixels."""
    valid, y = split_labels(labels, mu.shape[0], ignore)
    inside = valid[:, None]
    x1 = mu[y].movedim(-1, 1)
    time = t[:, None, None, None]
    xhat, slack = out, None
    if predicts == "velocity":
        xhat = (1 - time) * (x0 + out) + time * x1
        slack = (4 * u * ((1 - time) * (x0.abs() + out.abs()) + time * x1.abs())).nan_to_num(posinf=0)
    scale = torch.ones_like(time)
    if predicts != space:
        scale = 1 - time if space == "endpoint" else 1 / (1 - time).clamp_min(t_min)
    target = x1 - x0 if predicts == "velocity" else x1
    error = scale * (out - target)
    bound = 6 * u * scale * (out.abs() + x1.abs() + (x0.abs() if predicts == "velocity" else 0))
    free = torch.zeros_like(error, dtype=torch.bool)
    if weight:
        g = correction(xhat, labels, mu, ignore=ignore, u=u, slack=slack, **options)
        by = weight * (1 - time if schedule == "annealed" else 1)
        error = error + by * g.value
        bound = bound + by * (g.bound + 4 * u * g.value.abs())
        free = g.free
    if u > 1e-10:
        # A sum of inputs may overflow before it is scaled down.
        middle = torch.maximum(xhat.abs(), out.abs() + x0.abs())
        free = free | ((middle > HUGE * 0.5) | (error.abs() > HUGE * 0.5)) & middle.isfinite()
    error = torch.where(inside, error, 0)
    bound = torch.where(inside, bound, 0).nan_to_num(posinf=0)
    free = free & inside
    channels = mu.shape[1]
    square = error.square().mean(1)
    square_off = (2 * error.abs() * bound + bound.square()).mean(1) + (channels + 4) * u * square + SMALLEST
    any_free = free.any(1)
    if u > 1e-10:
        any_free = any_free | (square * channels > HUGE * 0.5) & (square.isfinite())
    back = scale * (2 / channels)
    residual = Answer(error * back, bound * back + 6 * u * (error * back).abs(), free)
    return Answer(square, square_off.nan_to_num(posinf=0), any_free), residual, valid
