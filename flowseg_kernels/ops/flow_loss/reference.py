"""Plain PyTorch for flow_loss: the specification, and the fallback if no kernel can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values, check_time_values, compute_dtype, valid_mask
from ..distance_correction.reference import distance_correction

__all__ = ["REDUCTIONS", "SCHEDULES", "SPACES", "flow_loss", "flow_loss_bwd"]

#: Values of `predicts` and of `loss_space`. Compiled kernels use the position in each of these tuples as the option's number.
SPACES = ("velocity", "endpoint")
SCHEDULES = ("static", "annealed")
REDUCTIONS = ("mean", "sum", "none")


def error_scale(t: Tensor, predicts: str, loss_space: str, t_min: float) -> Tensor:
    """Return d(error) / d(prediction): 1 if the loss is in the prediction's space, else 1 - t or 1 / max(1 - t, t_min)."""
    if predicts == loss_space:
        return torch.ones_like(t)
    return 1 - t if loss_space == "endpoint" else 1 / (1 - t).clamp_min(t_min)


def flow_loss(
    prediction: Tensor,
    source: Tensor,
    labels: Tensor,
    t: Tensor,
    centroids: Tensor,
    predicts: str,
    loss_space: str,
    correction_weight: float,
    schedule: str,
    temperature: float,
    eps: float,
    transform: str,
    max_norm: float | None,
    ignore_index: int,
    reduction: str,
    t_min: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the residual 2/C scale error (B, C, H, W) (empty without need_grad), and the number of valid pixels.

    The gradient of the loss is residual * grad_loss / count for "mean", residual * grad_loss for "sum" and "none". A kernel may
    divide the residual by the count itself; it then returns 1 as the count.
    """
    dtype = compute_dtype(prediction.dtype)
    check_code_values(centroids)
    mu = centroids.to(dtype)
    out, x0, time = prediction.to(dtype), source.to(dtype), t.to(dtype)[:, None, None, None]
    valid, classes = valid_mask(labels, mu.shape[0], ignore_index)
    check_time_values(t)
    x1 = mu[classes].movedim(-1, 1)
    xhat = (1 - time) * (x0 + out) + time * x1 if predicts == "velocity" else out
    scale = error_scale(time, predicts, loss_space, t_min)
    error = scale * (out - (x1 - x0 if predicts == "velocity" else x1))
    if correction_weight:
        weight = correction_weight * (1 - time if schedule == "annealed" else 1)
        error = error + weight * distance_correction(
            xhat, labels, mu, temperature, eps, transform, max_norm, ignore_index
        )
    error = torch.where(valid[:, None], error, 0)
    per_pixel = error.square().mean(dim=1)
    count = valid.sum()
    if reduction == "mean":
        loss = per_pixel.sum() / count.clamp_min(1)
    else:
        loss = per_pixel.sum() if reduction == "sum" else per_pixel.contiguous()
    residual = (error * scale * (2 / mu.shape[1])).to(prediction.dtype) if need_grad else prediction.new_empty(0)
    return loss, residual.contiguous(), count


def flow_loss_bwd(grad_loss: Tensor, residual: Tensor, count: Tensor, reduction: str) -> Tensor:
    """Return the gradient of the prediction, in its dtype: the saved residual times the gradient of the loss."""
    dtype = compute_dtype(residual.dtype)
    scale = grad_loss.to(dtype)
    if reduction == "mean":
        scale = scale / count.clamp_min(1).to(dtype)
    elif reduction == "none":
        scale = scale[:, None]
    return (residual.to(dtype) * scale).to(residual.dtype).contiguous()
