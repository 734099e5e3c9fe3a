"""The decode grid: for each cell of a 3-D grid, a list of the centroids that can be nearest to a point of that cell.

Why it is exact: let d_k(p) be the squared distance from a point p to centroid k. The difference d_k(p) - d_j(p) is affine in p. So
in a cell with centre c and half-width h its smallest value is d_k(c) - d_j(c) - 2 h |mu_k - mu_j|_1. If that is positive, j is
nearer than k everywhere in the cell, and the list leaves k out. For j we use the centroid nearest to the cell's centre. Cells are
slightly enlarged to cover the rounding of the cell index and of fp32 distances: the list keeps every centroid that fp32 arithmetic
could find nearest.

A margin also needs the second smallest distance. A grid of order 2 leaves k out if two others are nearer everywhere in the cell; we
use the two nearest to its centre. Each of them is also nearer in fp32, so the two smallest fp32 distances are in the list.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .derived import Derived

__all__ = ["DecodeGrid", "build_decode_grid", "decode_grid"]

#: Centroids per record. A row of floats fills one AVX2 register, and a record two cache lines.
LANES = 8
_LEVELS = 6
_SIZE = 2**_LEVELS  # cells per axis
_PAIRS_AT_ONCE = 1 << 16
_MOST_PAIRS = 1 << 23  # 65,536 well spread codes need 4 million
#: A word holds three class numbers of _WORD_BITS bits and the sign, for up to _WORD_CLASSES classes (csrc/shared/decode_grid.h).
_WORD_BITS = 10
_WORD_CLASSES = 2**_WORD_BITS


@dataclasses.dataclass(frozen=True)
class DecodeGrid:
    """The candidate lists of a codebook.

    cells:   (2, G, G, G) int32: two tables, each over (channel 2, channel 1, channel 0). In the first, v >= 0 says that class v
             is nearest in the whole cell; v < 0 says that the candidates are in the records from -1 - v on. The second table is
             for GPUs, where each step of a chain of look-ups has a long latency: up to three candidates of ten bits each are in
             the word itself, in the order of the classes, the last one repeated; longer lists are in the records as before. With
             more than 1024 classes, and in a grid of order 2, the second table equals the first. In a grid of order 2 all words
             are negative.
    records: (R, 4, 8) fp32: channels 0, 1, 2 and the class of up to eight candidates; padding is at +inf.
    records_left: (R,) int32: number of records from record r to the end of its list, r included. The ops call it `groups`.
    low, scale: cell index along an axis = floor((x - low) * scale).
    """

    cells: Tensor
    records: Tensor
    records_left: Tensor
    low: float
    scale: float


def _can_win(cell: Tensor, candidate: Tensor, mu: Tensor, low: float, width: float, size: int, order: int) -> Tensor:
    """A mask of the (cell, candidate) pairs. It keeps each candidate that `order` others do not surely beat in the whole cell.

    Pairs are sorted by cell. The others are the `order` candidates nearest to the cell's centre.
    """
    index = torch.stack((cell % size, cell // size % size, cell // (size * size)), dim=1)
    centre = low + (index.double() + 0.5) * width
    d = (centre - mu[candidate]).square().sum(dim=1)
    # Enlarge the cell: the index may be off by 1e-5 cells. Add slack: fp32 distances in the cell may be off by some 1e-7 of their
    # size, which is at most 2 d + 6 half^2.
    half = 0.5 * width * (1 + 1e-3)
    keep = torch.zeros(len(cell), dtype=torch.bool)
    left = d
    for rank in range(order):
        nearest = torch.full((size**3,), float("inf"), dtype=torch.float64).scatter_reduce_(0, cell, left, "amin")[cell]
        is_nearest = (left == nearest) & nearest.isfinite()
        winner = torch.full((size**3,), mu.shape[0], dtype=torch.int64)
        rival = winner.scatter_reduce_(0, cell[is_nearest], candidate[is_nearest], "amin")[cell]
        if rank + 1 < order:
            left = left.masked_fill(rival == candidate, float("inf"))
        exists = rival < mu.shape[0]
        slack = 4e-6 * (d + nearest + 12 * half**2)
        reach = 2 * half * (mu[candidate] - mu[rival.clamp_max(mu.shape[0] - 1)]).abs().sum(dim=1)
        keep |= ~exists | (d - nearest <= reach + slack)
    return keep


def _first_of_equals(codes: Tensor, count: int) -> Tensor:
    """The rows of `codes`, in order, without those that have `count` equal rows before them."""
    _, which, sizes = codes.unique(dim=0, return_inverse=True, return_counts=True)
    by_group = which.argsort(stable=True)
    place = torch.arange(len(codes)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return by_group[place < count].sort().values


def build_decode_grid(centroids: Tensor, order: int = 1) -> DecodeGrid | None:
    """Build the decode grid of (K, 3) centroids on the CPU, refining from 1 to 2, 4, ..., 64 cells per axis.

    Args:
        order: 1: lists hold each code that can be nearest. 2: each that can be nearest or second nearest; no cell names a class.

    Return None if the lists would be long, as for codes that are close together for their extent, or if fp32 cannot tell the cells
    apart.
    """
    given = centroids.detach().to("cpu", torch.float64)
    # Ties go to the lowest class. A code with `order` equals before it is never among the first `order`.
    kept_codes = _first_of_equals(given, order)
    mu = given[kept_codes]
    span = float((mu.max() - mu.min()).clamp_min(1e-3))
    # Round low and scale to fp32, as the kernels use them. Then x - low is a correctly rounded difference of two fp32 numbers, and
    # the index is as exact for codes around 1000 as for codes around 0.
    low = _fp32(float(mu.min()) - 0.35 * span)
    width = float(mu.max()) + 0.35 * span - low
    if not 0 < width < 1e18:  # squared distances stay finite
        return None
    scale = _fp32(_SIZE / width)
    cell, candidate = torch.zeros(mu.shape[0], dtype=torch.int64), torch.arange(mu.shape[0])
    offsets = torch.tensor([(i, j, k) for k in (0, 1) for j in (0, 1) for i in (0, 1)])
    for level in range(1, _LEVELS + 1):
        size = 2**level
        half = size // 2
        width = _SIZE / scale / size
        kept_cells, kept_candidates = [], []
        for at in range(0, cell.shape[0], _PAIRS_AT_ONCE):
            # The end of a chunk may split a parent's pairs. Then the test uses the nearest of a part, and keeps more, never fewer.
            parent, option = cell[at : at + _PAIRS_AT_ONCE], candidate[at : at + _PAIRS_AT_ONCE]
            index = torch.stack((parent % half, parent // half % half, parent // (half * half)), dim=1)
            child = index[:, None] * 2 + offsets  # (pairs, 8, 3)
            child = (child[..., 0] + size * (child[..., 1] + size * child[..., 2])).flatten()
            option = option[:, None].expand(-1, 8).flatten()
            keep = _can_win(child, option, mu, low, width, size, order)
            kept_cells.append(child[keep])
            kept_candidates.append(option[keep])
        cell, candidate = torch.cat(kept_cells), torch.cat(kept_candidates)
        # Sort by cell again, so that the next level has a cell's candidates in one chunk.
        by_cell = torch.argsort(cell * mu.shape[0] + candidate)
        cell, candidate = cell[by_cell], candidate[by_cell]
        if cell.shape[0] > _MOST_PAIRS:
            return None
    return _pack(cell, kept_codes[candidate], given.float(), low, scale, order)


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _pack(cell: Tensor, candidate: Tensor, mu: Tensor, low: float, scale: float, order: int) -> DecodeGrid:
    """Store candidate lists, sorted by cell and class, as cells and records. Equal lists are stored once."""
    count = torch.bincount(cell, minlength=_SIZE**3)
    start = count.cumsum(0) - count
    cells = candidate[start].to(torch.int32)  # correct for single candidates; the loop sets all others
    all_records, all_records_left, base = [], [], 0
    for n in count.unique().tolist():
        if n == 1 and order == 1:
            continue
        where = (count == n).nonzero()[:, 0]
        lists, which = candidate[start[where][:, None] + torch.arange(n)].unique(dim=0, return_inverse=True)
        length = -(-n // LANES)  # records per list
        padded = torch.full((lists.shape[0], length * LANES), -1)
        padded[:, :n] = lists
        padded = padded.view(-1, length, LANES)
        point = torch.where(padded[..., None] >= 0, mu[padded.clamp_min(0)], float("inf"))
        record = torch.cat((point, padded[..., None].float()), dim=3).transpose(2, 3)  # (lists, length, 4, LANES)
        all_records.append(record.reshape(-1, 4, LANES))
        all_records_left.append(torch.arange(length, 0, -1).repeat(lists.shape[0]))
        cells[where] = (-1 - base - which * length).to(torch.int32)
        base += lists.shape[0] * length
    records = torch.cat(all_records) if all_records else torch.empty(0, 4, LANES, dtype=torch.float32)
    records_left = (
        torch.cat(all_records_left).to(torch.int32) if all_records_left else torch.empty(0, dtype=torch.int32)
    )
    words = cells.clone()
    if mu.shape[0] <= _WORD_CLASSES and order == 1:
        short = (count <= 3).nonzero()[:, 0]
        places = torch.arange(3).minimum(count[short][:, None] - 1)
        words[short] = (
            (candidate[start[short][:, None] + places] << torch.arange(3) * _WORD_BITS).sum(dim=1).to(torch.int32)
        )
    cells = torch.stack((cells, words)).view(2, _SIZE, _SIZE, _SIZE)
    return DecodeGrid(cells, records.contiguous(), records_left, low, scale)


def decode_grid(derived: Derived, order: int = 1) -> DecodeGrid | None:
    """The decode grid of codes with three channels; None if lists would be long. A margin needs order 2."""

    def build() -> DecodeGrid | None:
        # The caller's default device must not apply to the tensors that the grid is computed from.
        with torch.no_grad(), torch.device("cpu"):
            return build_decode_grid(derived.codes.float(), order)

    return derived.cached(("decode grid", order), build)
