"""Plain PyTorch for decoding: the specification, and the fallback if no kernel can run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_code_values, compute_dtype
from ..distance_correction.reference import squared_distances

__all__ = ["nearest_centroid"]

# Most distances in memory at once. Without this bound a full image with many classes would not fit.
_DISTANCES_AT_ONCE = 1 << 24


def _nearest_of_rows(x: Tensor, mu: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    d = squared_distances(x, mu)
    finite = d.nan_to_num(nan=float("inf"), posinf=float("inf"))
    # argmin may return any of several equal minima. The first element that equals the minimum has the lowest index.
    nearest = finite.amin(dim=1, keepdim=True)
    labels = (finite == nearest).to(torch.uint8).argmax(dim=1)
    unknown = d.isnan().any(dim=1)
    second = finite.scatter(1, labels[:, None], float("inf")).amin(dim=1)
    distance = nearest[:, 0].sqrt()
    margin = second.sqrt() - distance
    nan = float("nan")
    return (
        labels.masked_fill(unknown, ignore_index),
        distance.masked_fill(unknown, nan),
        margin.masked_fill(unknown, nan),
    )


def nearest_centroid(
    x: Tensor,
    centroids: Tensor,
    tables: list[Tensor],
    grid_low: float,
    grid_scale: float,
    out_dtype: str,
    return_distance: bool,
    return_margin: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels, distances and margins, each (B, H, W); the last two are empty if not requested.

    Every centroid is searched, without the decode grid.
    """
    dtype = compute_dtype(x.dtype)
    check_code_values(centroids)
    mu = centroids.to(dtype)
    columns = max(1, min(x.shape[3], _DISTANCES_AT_ONCE // mu.shape[0]))
    rows = max(1, _DISTANCES_AT_ONCE // (mu.shape[0] * columns))
    shape = (x.shape[0], x.shape[2], x.shape[3])
    labels = torch.empty(shape, dtype=getattr(torch, out_dtype), device=x.device)
    distance = torch.empty(shape if return_distance else (0,), dtype=dtype, device=x.device)
    margin = torch.empty(shape if return_margin else (0,), dtype=dtype, device=x.device)
    for b in range(shape[0]):
        for r in range(0, shape[1], rows):
            for c in range(0, shape[2], columns):
                part = (b, slice(r, r + rows), slice(c, c + columns))
                found = _nearest_of_rows(x[b : b + 1, :, part[1], part[2]].to(dtype), mu, ignore_index)
                labels[part] = found[0][0]
                if return_distance:
                    distance[part] = found[1][0]
                if return_margin:
                    margin[part] = found[2][0]
    return labels, distance, margin
