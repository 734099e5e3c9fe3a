"""Plain PyTorch for decode_confusion: decode, then count."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import valid_mask
from ..nearest_centroid.reference import nearest_centroid

__all__ = ["decode_confusion"]


def _count(classes: Tensor, counted: Tensor, bins: int) -> Tensor:
    """The number of counted pixels per bin."""
    # Pixels that do not count go to an extra last bin. A data-dependent shape would wait for the device.
    at = torch.where(counted, classes, bins).flatten()
    return torch.zeros(bins + 1, dtype=torch.int64, device=at.device).scatter_add_(0, at, torch.ones_like(at))[:-1]


def decode_confusion(
    x: Tensor,
    target: Tensor,
    centroids: Tensor,
    tables: list[Tensor],
    grid_low: float,
    grid_scale: float,
    by_class: bool,
    ignore_index: int,
) -> Tensor:
    """Return counts over pixels with a valid target and without NaN, int64.

    (K, K) counts[truth, prediction], or by_class (3, K): hits, truths and predictions of each class.
    """
    k = centroids.shape[0]
    # -1 marks pixels with NaN: the label map is int64 and never leaves this function.
    labels, _, _ = nearest_centroid(x, centroids, tables, grid_low, grid_scale, "int64", False, False, -1)
    valid, classes = valid_mask(target, k, ignore_index)
    counted = valid & (labels >= 0)
    if by_class:
        hits = counted & (labels == classes)
        return torch.stack((_count(classes, hits, k), _count(classes, counted, k), _count(labels, counted, k)))
    return _count(classes * k + labels, counted, k * k).view(k, k).clone()  # an op's output must not be a view
