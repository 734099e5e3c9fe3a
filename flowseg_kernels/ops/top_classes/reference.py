"""Plain PyTorch for the k best classes: the specification, and the fallback if no kernel can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values, compute_dtype
from ..class_probabilities.reference import logits
from ..distance_correction.reference import squared_distances

__all__ = ["top_classes"]

# Most distances in memory at once. Without this bound a full image with many classes would not fit.
_DISTANCES_AT_ONCE = 1 << 24


def top_classes(
    x: Tensor,
    centroids: Tensor,
    k: int,
    temperature: float,
    eps: float,
    transform: str,
    out_dtype: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the k nearest classes and their probabilities, each (B, k, H, W), nearest first, ties to the lowest index."""
    dtype = compute_dtype(x.dtype)
    check_code_values(centroids)
    mu = centroids.to(dtype)
    batch, _, height, width = x.shape
    labels = torch.empty((batch, k, height, width), dtype=getattr(torch, out_dtype), device=x.device)
    probabilities = torch.empty(labels.shape, dtype=dtype, device=x.device)
    columns = max(1, min(width, _DISTANCES_AT_ONCE // mu.shape[0]))
    rows = max(1, _DISTANCES_AT_ONCE // (mu.shape[0] * columns))
    for b in range(batch):
        for r in range(0, height, rows):
            for c in range(0, width, columns):
                place = (b, slice(None), slice(r, r + rows), slice(c, c + columns))
                part = x[place][None].to(dtype)
                d = squared_distances(part, mu)
                # A stable sort keeps the lowest of equal distances first.
                known = d.nan_to_num(nan=float("inf"), posinf=float("inf"))
                nearest = known.sort(dim=1, stable=True).indices[:, :k]
                p = torch.softmax(logits(d, part, temperature, eps, transform), dim=1)
                unknown = part.isnan().any(dim=1, keepdim=True)
                labels[place] = nearest.masked_fill(unknown, ignore_index)[0]
                probabilities[place] = p.gather(1, nearest)[0]
    return labels, probabilities
