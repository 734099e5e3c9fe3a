"""Plain PyTorch for the distance-aware correction: the specification, and the fallback if no kernel can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values, compute_dtype, valid_mask

__all__ = ["TRANSFORMS", "distance_correction", "potential"]

#: Names of the decreasing functions T from squared distance to logit. Compiled kernels use the position as the transform's number.
TRANSFORMS = ("neg_log", "neg_sq", "neg_dist", "inverse")


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """d[b, k, h, w] = sum_c (x[b, c, h, w] - mu[k, c])^2. The expanded square would cancel near centroids."""
    total = None
    for c in range(centroids.shape[1]):
        square = (x[:, c, None] - centroids[None, :, c, None, None]).square()
        total = square if total is None else total + square
    return total


def transform_distances(d: Tensor, eps: float, transform: str) -> tuple[Tensor, Tensor]:
    """Return T(d) and T'(d). T is -log(d+eps) for neg_log, -d for neg_sq, -sqrt(d+eps) for neg_dist, 1/(d+eps) for inverse."""
    if transform == "neg_log":
        return -(d + eps).log(), -1 / (d + eps)
    if transform == "neg_sq":
        return -d, torch.full_like(d, -1.0)
    if transform == "neg_dist":
        root = (d + eps).sqrt()
        return -root, -0.5 / root
    assert transform == "inverse"
    return 1 / (d + eps), -1 / (d + eps).square()


def potential(
    xhat: Tensor, labels: Tensor, centroids: Tensor, temperature: float, eps: float, transform: str, ignore_index: int
) -> Tensor:
    """Return Phi = -log softmax(T(d) / tau)[y] (B, H, W), 0 where ignored. It is differentiable; only tests use it."""
    valid, classes = valid_mask(labels, centroids.shape[0], ignore_index)
    logits, _ = transform_distances(squared_distances(xhat, centroids), eps, transform)
    phi = -torch.log_softmax(logits / temperature, dim=1).gather(1, classes[:, None])[:, 0]
    return torch.where(valid, phi, 0)


def distance_correction(
    xhat: Tensor,
    labels: Tensor,
    centroids: Tensor,
    temperature: float,
    eps: float,
    transform: str,
    max_norm: float | None,
    ignore_index: int,
) -> Tensor:
    """Return grad Phi = (2 / tau) sum_k (p_k - 1[k = y]) T'(d_k) (xhat - mu_k), 0 where ignored, in the dtype of xhat."""
    dtype = compute_dtype(xhat.dtype)
    check_code_values(centroids)
    x, mu = xhat.to(dtype), centroids.to(dtype)
    valid, classes = valid_mask(labels, mu.shape[0], ignore_index)
    logits, slope = transform_distances(squared_distances(x, mu), eps, transform)
    excess = torch.softmax(logits / temperature, dim=1)
    own = classes[:, None]
    p_own = excess.gather(1, own)
    # If p_y is close to 1, take p_y - 1 from the sum of the other classes: the subtraction would lose all digits.
    others = excess.scatter(1, own, 0.0).sum(dim=1, keepdim=True)
    excess = excess.scatter(1, own, torch.where(p_own > 0.5, -others, p_own - 1))
    weight = excess * slope * (2 / temperature)
    grad = torch.stack(
        [(weight * (x[:, c, None] - mu[None, :, c, None, None])).sum(dim=1) for c in range(mu.shape[1])], dim=1
    )
    # NaN in all channels of a pixel that is not finite or whose square overflows; "inverse" would give 0 in the finite channels.
    grad = grad + x.square().sum(dim=1, keepdim=True) * 0
    if max_norm is not None:
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        grad = grad * (max_norm / norm.clamp_min(max_norm))
    return torch.where(valid[:, None], grad, 0).to(xhat.dtype).contiguous()
