"""Plain PyTorch for flow_interpolate: the specification, and the fallback if no kernel can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values, check_time_values, compute_dtype, valid_mask

__all__ = ["flow_interpolate", "flow_interpolate_bwd"]


def flow_interpolate(source: Tensor, labels: Tensor, t: Tensor, centroids: Tensor, ignore_index: int) -> Tensor:
    """Return x_t = (1 - t) x0 + t mu_y in the dtype of source. An ignored pixel has no end point and stays at x0."""
    dtype = compute_dtype(source.dtype)
    check_code_values(centroids)
    valid, classes = valid_mask(labels, centroids.shape[0], ignore_index)
    check_time_values(t)
    time = t.to(dtype)[:, None, None, None]
    x0 = source.to(dtype)
    moved = (1 - time) * x0 + time * centroids.to(dtype)[classes].movedim(-1, 1)
    return torch.where(valid[:, None], moved, x0).to(source.dtype).contiguous()


def flow_interpolate_bwd(
    grad: Tensor, source: Tensor, labels: Tensor, t: Tensor, centroids: Tensor, ignore_index: int, need_t: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of source and of t (B,), each in the dtype of its input; that of t is empty without need_t.

    d x_t / d x0 = 1 - t (1 where ignored); d x_t / d t = mu_y - x0 (0 where ignored).
    """
    dtype = compute_dtype(source.dtype)
    check_code_values(centroids)
    valid, classes = valid_mask(labels, centroids.shape[0], ignore_index)
    g = grad.to(dtype)
    time = t.to(dtype)[:, None, None, None]
    grad_source = torch.where(valid[:, None], (1 - time) * g, g).to(source.dtype).contiguous()
    if not need_t:
        return grad_source, t.new_empty(0)
    slope = torch.where(valid[:, None], centroids.to(dtype)[classes].movedim(-1, 1) - source.to(dtype), 0)
    return grad_source, (g * slope).sum(dim=(1, 2, 3), dtype=torch.float64).to(t.dtype)
