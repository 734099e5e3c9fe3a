"""The tables that a decoding kernel uses for a set of codes: the decode grid, or guesses, or none."""

from __future__ import annotations

import torch
from torch import Tensor

from .decode_grid import decode_grid
from .decode_guesses import CHANNELS, decode_guesses
from .derived import Derived, derived_from

__all__ = ["Tables", "decode_tables", "tables_of"]

#: Tables as kernels take them: tensors, low and scale of the grid. No tensors: search all codes. Three tensors: cells, records and
#: records_left of the decode grid. Five tensors: projection, starts, members, rivals and certain of the guesses.
Tables = tuple[list[Tensor], float, float]
_NONE: Tables = ([], 0.0, 0.0)


def decode_tables(derived: Derived, device: torch.device, margin: bool = False) -> Tables:
    """The tables of these codes on a device; see DecodeGrid and DecodeGuesses. A margin needs another grid than a label."""
    channels = derived.codes.shape[1]
    low = scale = 0.0
    order = 2 if margin and channels == 3 else 1
    if channels == 3:
        grid = decode_grid(derived, order)
        if grid is None:
            return _NONE
        tensors, low, scale = [grid.cells, grid.records, grid.records_left], grid.low, grid.scale
    elif channels in CHANNELS:
        guesses = decode_guesses(derived)
        if guesses is None:
            return _NONE
        tensors = guesses.tensors()
    else:
        return _NONE
    return derived.cached(("decode tables", order, device), lambda: [v.to(device) for v in tensors]), low, scale


def tables_of(x: Tensor, centroids: Tensor, wanted: bool, margin: bool = False) -> Tables:
    """The tables of these codes on the device of x, if kernels can use them and building them pays."""
    if not wanted or centroids.dtype != torch.float32:
        return _NONE
    channels = centroids.shape[1]
    if channels != 3 and channels not in CHANNELS:
        return _NONE
    derived = derived_from(centroids)
    # A GPU's call may be recorded in a CUDA graph, where nothing can be built. So a warm-up of any size builds the tables.
    pixels = x.numel() // channels if x.device.type == "cpu" else centroids.shape[0]
    return decode_tables(derived, x.device, margin) if derived.count_decode(pixels) else _NONE
