"""Plain PyTorch for decode_confusion: decode, then count pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import valid_mask
from ..nearest_centroid.reference import nearest_centroid

__all__ = ["decode_confusion"]


def decode_confusion(
    x: Tensor,
    target: Tensor,
    centroids: Tensor,
    cells: Tensor | None,
    records: Tensor | None,
    records_left: Tensor | None,
    grid_low: float,
    grid_scale: float,
    ignore_index: int,
) -> Tensor:
    """Return counts[truth, prediction] (K, K) int64 over pixels with a valid target and without NaN."""
    k = centroids.shape[0]
    # -1 marks pixels with NaN: the label map is int64 and never leaves this function.
    labels, _, _ = nearest_centroid(
        x, centroids, cells, records, records_left, grid_low, grid_scale, "int64", False, False, -1
    )
    valid, classes = valid_mask(target, k, ignore_index)
    # Pixels that do not count go to an extra last bin. A data-dependent shape would wait for the device.
    pairs = torch.where(valid & (labels >= 0), classes * k + labels, k * k).flatten()
    counts = torch.zeros(k * k + 1, dtype=torch.int64, device=x.device).scatter_add_(0, pairs, torch.ones_like(pairs))
    return counts[:-1].view(k, k).clone()  # an op's output must not be a view of a larger tensor
