"""The codebook of a run."""

from __future__ import annotations

from flowseg.config import CodesConfig
from flowseg_kernels import Codebook, grid_centroids, kronecker_centroids

IGNORE_INDEX = 255


def build_codebook(codes: CodesConfig, num_classes: int) -> Codebook:
    """Centroids ``(num_classes, C)`` in [-1, 1] by the configured sequence, with ignore index 255."""
    if codes.sequence == "grid":
        centroids = grid_centroids(num_classes, codes.channels)
    else:
        centroids = kronecker_centroids(num_classes, codes.channels, sequence=codes.sequence)
    return Codebook(centroids, ignore_index=IGNORE_INDEX)
