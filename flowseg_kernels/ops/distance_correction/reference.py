"""Plain PyTorch for the distance-aware correction: the specification, and the last fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values
from ..shared.formulas import compute_dtype, squared_distances, valid_mask

__all__ = ["TRANSFORMS", "distance_correction", "potential"]

#: Names of the decreasing maps T from squared distance to logit; the position is the code that compiled kernels use.
TRANSFORMS = ("neg_log", "neg_sq", "neg_dist", "inverse")


def transform_distances(d: Tensor, eps: float, transform: str) -> tuple[Tensor, Tensor]:
    """T(d) and T'(d): neg_log -log(d+eps); neg_sq -d; neg_dist -sqrt(d+eps); inverse 1/(d+eps)."""
    if transform == "neg_log":
        return -(d + eps).log(), -1 / (d + eps)
    if transform == "neg_sq":
        return -d, torch.full_like(d, -1.0)
    if transform == "neg_dist":
        root = (d + eps).sqrt()
        return -root, -0.5 / root
    return 1 / (d + eps), -1 / (d + eps).square()


def potential(
    xhat: Tensor, labels: Tensor, centroids: Tensor, temperature: float, eps: float, transform: str, ignore_index: int
) -> Tensor:
    """Phi = -log softmax(T(d) / tau)[y], (B, H, W); 0 where ignored. Differentiable; the tests differentiate it."""
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
    """grad Phi = (2 / tau) sum_k (p_k - 1[k = y]) T'(d_k) (xhat - mu_k), 0 where ignored; same dtype as xhat."""
    dtype = compute_dtype(xhat.dtype)
    check_code_values(centroids)
    x, mu = xhat.to(dtype), centroids.to(dtype)
    valid, classes = valid_mask(labels, mu.shape[0], ignore_index)
    logits, slope = transform_distances(squared_distances(x, mu), eps, transform)
    excess = torch.softmax(logits / temperature, dim=1)
    own = classes[:, None]
    p_own = excess.gather(1, own)
    # p_y - 1 from the others where it is small: next to the pixel's own code the difference would hold no digit.
    others = excess.scatter(1, own, 0.0).sum(dim=1, keepdim=True)
    excess = excess.scatter(1, own, torch.where(p_own > 0.5, -others, p_own - 1))
    weight = excess * slope * (2 / temperature)
    grad = torch.stack(
        [(weight * (x[:, c, None] - mu[None, :, c, None, None])).sum(dim=1) for c in range(mu.shape[1])], dim=1
    )
    # A pixel that is not finite, or whose square overflows, has no correction in any channel: "inverse" would give 0 in the others.
    grad = grad + x.square().sum(dim=1, keepdim=True) * 0
    if max_norm is not None:
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        grad = grad * (max_norm / norm.clamp_min(max_norm))
    return torch.where(valid[:, None], grad, 0).to(xhat.dtype).contiguous()
