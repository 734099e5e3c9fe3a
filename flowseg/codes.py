"""The codebook of a run."""

from __future__ import annotations

import torch

from flowseg.config import CodesConfig
from flowseg.errors import UserError
from flowseg.label_kinds import label_kind
from flowseg_kernels import Codebook, grid_centroids, kronecker_centroids


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
