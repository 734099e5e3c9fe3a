"""What the ops take of a codebook: its tensors. What follows from their values is found when an op runs.

So a compiled or exported graph holds nothing that could be of other codes than those it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..derived import NO_GRID, derived_from, ignored_label

__all__ = ["eps_of", "grid_of", "label_of"]


def label_of(ignored: Tensor | None, ignore_index: int) -> int:
    """The ignored label: a codebook's, or the number where there is none."""
    return ignore_index if ignored is None else ignored_label(ignored)


def eps_of(eps: float | None, centroids: Tensor) -> float:
    """eps, or the default of these codes."""
    return derived_from(centroids).default_eps if eps is None else eps


def grid_of(
    x: Tensor, centroids: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, float]:
    """The decode grid of these codes (cells, records, groups, low, scale) on the device of x, where kernels can use one."""
    if not wanted or centroids.dtype != torch.float32 or centroids.shape[1] != 3:
        return NO_GRID
    derived = derived_from(centroids)
    return derived.tables(x.device) if derived.pays_for_grid() else NO_GRID
