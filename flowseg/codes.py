"""The codebook of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from flowseg.config import CodesConfig
from flowseg.errors import UserError
from flowseg.label_kinds import label_kind
from flowseg_kernels import Codebook, grid_centroids, kronecker_centroids

MOST_CHANNELS = 16
"""Largest number of channels of compiled kernels. With more the ops run as plain PyTorch."""


def build_codebook(codes: CodesConfig, num_classes: int) -> Codebook:
    """Make the centroids ``(num_classes, C)`` in [-1, 1] by the configured sequence.

    The ignored label is that of :func:`flowseg.label_kinds.label_kind`: 255 up to 255 classes, else 65535.

    Raises:
        UserError: a one-hot code with another number of channels than classes.
    """
    if codes.sequence == "one_hot":
        if codes.channels != num_classes:
            raise UserError(
                f"codes.channels must be the number of classes, {num_classes}, when codes.sequence is 'one_hot', got "
                f"{codes.channels}; add --set codes.channels={num_classes}"
            )
        centroids = 2 * torch.eye(num_classes) - 1
    elif codes.sequence == "grid":
        centroids = grid_centroids(num_classes, codes.channels)
    else:
        centroids = kronecker_centroids(num_classes, codes.channels, sequence=codes.sequence)
    return Codebook(centroids, ignore_index=label_kind(num_classes).ignore)


def decode_one_hot(field: Tensor, *, with_margin: bool = False) -> tuple[Tensor, Tensor | None]:
    """Decode a field ``(K, H, W)`` under the one-hot codes of :func:`build_codebook`, in K instead of K x K operations per pixel.

    Returns:
        labels ``(H, W)`` int64, the largest channel, ties to the lowest index; a pixel with NaN has the ignored label. With
        ``with_margin`` also the margin ``(H, W)``, the second smallest distance to a code minus the smallest; else ``None``.
    """
    largest = field.argmax(0)
    labels = largest.masked_fill(field.isnan().any(0), label_kind(len(field)).ignore)
    if not with_margin:
        return labels, None
    first, second = field.topk(2, 0).values
    # Squared distances to two codes differ by four times the difference of their channels. The quotient below is the difference
    # of the two distances without its cancellation.
    nearest = (field + 1).scatter(0, largest[None], 0).square().sum(0) + (first - 1).square()
    gap = 4 * (first - second)
    return labels, gap / (nearest.sqrt() + (nearest + gap).sqrt())
