"""Plain PyTorch for class probabilities: the specification, and the fallback if no kernel can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values, compute_dtype
from ..distance_correction.reference import squared_distances, transform_distances

__all__ = ["FORMS", "class_probabilities", "logits"]

#: Results that class_probabilities can return. Compiled kernels use the position as the form's number.
FORMS = ("probabilities", "log_probabilities", "logits")


def logits(d: Tensor, x: Tensor, temperature: float, eps: float, transform: str) -> Tensor:
    """T(d) / tau of squared distances d (B, K, H, W), and NaN for a pixel of x that is not finite or whose square overflows.

    The transform "inverse" would give 0 there, and probabilities that look valid.
    """
    return transform_distances(d, eps, transform)[0] / temperature + x.square().sum(dim=1, keepdim=True) * 0


def class_probabilities(
    x: Tensor, centroids: Tensor, temperature: float, eps: float, transform: str, form: str
) -> Tensor:
    """Return softmax_k(T(d_k) / tau), its logarithm, or T(d_k) / tau, as `form` says: (B, K, H, W) in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    check_code_values(centroids)
    x, mu = x.to(dtype), centroids.to(dtype)
    found = logits(squared_distances(x, mu), x, temperature, eps, transform)
    if form == "probabilities":
        found = torch.softmax(found, dim=1)
    elif form == "log_probabilities":
        found = torch.log_softmax(found, dim=1)
    return found.contiguous()
