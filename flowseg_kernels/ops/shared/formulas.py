"""Plain PyTorch functions that several references share."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_label_values

__all__ = ["compute_dtype", "encode_labels", "squared_distances", "valid_mask"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of distances and sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def valid_mask(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Split labels (B, H, W) into (valid (B, H, W) bool, class (B, H, W) int64). The class of an invalid pixel is 0.

    Raises ValueError for CPU labels outside [0, K) that are not ignore_index; on other devices such pixels count as ignored.
    """
    labels = labels.long()
    check_label_values("labels", labels, num_classes, ignore_index)
    valid = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    return valid, torch.where(valid, labels, 0)


def encode_labels(classes: Tensor, centroids: Tensor) -> Tensor:
    """Codes (B, C, H, W) of classes (B, H, W) in [0, K)."""
    return centroids[classes].movedim(-1, 1)


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """d[b, k, h, w] = sum_c (x[b, c, h, w] - mu[k, c])^2. The expanded square would cancel near centroids."""
    total = None
    for c in range(centroids.shape[1]):
        square = (x[:, c, None] - centroids[None, :, c, None, None]).square()
        total = square if total is None else total + square
    return total
