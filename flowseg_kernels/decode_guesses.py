"""Guesses: tables that decode codes with 4 to 16 channels without comparing a pixel with every code.

A kernel guesses a pixel's class, and the distance to that one code proves most guesses. Let g be a code, D_j the distance from g to
its nearest other codes (D_0 the smallest), and d the distance from the pixel to g. By the triangle inequality, a code farther than
2 d from g is farther from the pixel than g. So:

- d < D_0 / 2 proves that g is nearest.
- d < D_j / 2 proves that the nearest code is g or one of its j nearest rivals. Comparing these j + 1 codes decides.
- A pixel that no guess proves is compared with all codes.

Codes spread over more channels are farther apart, while the noise of a converged prediction stays small. So nearly every pixel
needs one comparison, whatever K is.

The label of a neighbouring pixel is a good guess. Else the pixel is projected to a few axes, and the cell of a grid over these axes
lists the codes whose projections are near. A guess cannot make a result wrong: the proof needs only `rivals` and `certain`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .derived import Derived

__all__ = ["DecodeGuesses", "build_decode_guesses", "decode_guesses"]

#: Channels with guesses. Below, the decode grid answers or a full search is as fast.
CHANNELS = range(4, 17)
#: A full search of fewer classes is as fast.
_FEWEST_CLASSES = 24
_RIVALS = 32
#: Number of (cell, code) pairs: the lists take at most 4 MiB, or 128 bytes per class.
_MOST_PAIRS = 1 << 20
#: Values per block of a search for the smallest ones.
_BLOCK = 32
#: Squared fp32 distances are off by at most (C + 3) 2^-24 of their size, 1.2e-6 for 16 channels: those that a pixel has to g and to
#: another code. See `certain`.
_SLACK = 1e-5


@dataclasses.dataclass(frozen=True)
class DecodeGuesses:
    """The tables of a codebook of K codes with C channels.

    projection: (A, C + 1) fp32, A axes. The position along axis a, in cells, is projection[a, :C] . x + projection[a, C]. Its
             integral part, limited to 0..G - 1, is the cell's index along a.
    starts:  (G^A + 1,) int32, G a power of two: the list of cell (i_0, ..., i_(A-1)) is members[starts[n] : starts[n + 1]] with
             n = i_0 + G (i_1 + G (i_2 + ...)).
    members: (E,) int32 classes, the most probable first.
    rivals:  (K, M) int32: the M classes nearest to each class, the nearest first. M = min(32, K - 1).
    certain: (K, M + 1) fp32: (D_j / 2)^2, less the rounding of fp32. If a pixel's squared distance to class g is below
             certain[g, j], the nearest class is g or one of rivals[g, :j]. certain[g, M] is +inf if M = K - 1.
    """

    projection: Tensor
    starts: Tensor
    members: Tensor
    rivals: Tensor
    certain: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.projection, self.starts, self.members, self.rivals, self.certain]


def _rivals(mu: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows (K, count) of the nearest other codes, the nearest first, and their distances D (K, count + 1), in fp64.

    A product selects a few more codes than wanted, and exact distances order them. No code that was not selected is nearer than the
    smallest distance that the rounding of the product allows for it. D is cut at that bound. The product is in fp64, which autocast
    and the precision of fp32 products leave alone.
    """
    exact = mu.double()
    centred = exact - exact.mean(dim=0)
    norms = centred.square().sum(dim=1)
    # Centring, the product, the norms and their sum round by at most (C + 5) 2^-51 of the largest norm.
    error = (mu.shape[1] + 5) * 2.0**-51 * float(norms.max())
    others = mu.shape[0] - 1
    selected = min(count + 1, others)
    # Whole blocks of columns; codes that fill the last block are infinitely far.
    columns = -(-mu.shape[0] // _BLOCK) * _BLOCK
    doubled = torch.zeros(mu.shape[1], columns, dtype=torch.float64)
    doubled[:, : mu.shape[0]] = -2 * centred.T
    others_norms = torch.full((columns,), float("inf"), dtype=torch.float64)
    others_norms[: mu.shape[0]] = norms
    rows, distances = [], []
    parts = torch.arange(mu.shape[0]).split(max(1, (1 << 20) // columns))
    # New memory for each part would take longer than the arithmetic.
    memory = torch.empty(len(parts[0]), columns, dtype=torch.float64)
    for part in parts:
        d = torch.mm(centred[part], doubled, out=memory[: len(part)]).add_(others_norms)
        d[torch.arange(len(part)), part] = float("inf")
        values, near = _smallest(d, selected)
        distance = (exact[part, None] - exact[near]).square().sum(dim=2).sqrt()
        if selected < others:
            last = values.amax(dim=1, keepdim=True) + norms[part, None]
            distance = distance.minimum((last - 2 * error).clamp_min(0).sqrt())
        else:
            distance = torch.cat((distance, torch.full((len(part), 1), float("inf"), dtype=torch.float64)), dim=1)
        distance, order = distance.sort(dim=1, stable=True)
        rows.append(near.gather(1, order[:, :count].clamp_max(selected - 1)))
        distances.append(distance[:, : count + 1])
    return torch.cat(rows), torch.cat(distances)


def _smallest(d: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest values of each row and their places: d.topk(count, largest=False), faster for long rows.

    The smallest values are in the blocks with the smallest minima. Block b of n holds every n-th value from b on.
    """
    blocks = d.view(len(d), _BLOCK, -1)
    if blocks.shape[2] < 2 * count:
        return tuple(d.topk(count, largest=False, sorted=False))
    chosen = blocks.amin(dim=1).topk(count, largest=False, sorted=False).indices
    values, place = (
        blocks.gather(2, chosen[:, None].expand(-1, _BLOCK, -1)).flatten(1).topk(count, largest=False, sorted=False)
    )
    return values, place // count * blocks.shape[2] + chosen.gather(1, place % count)


def _certain(distances: Tensor) -> Tensor:
    half = (distances / 2).square() * (1 - _SLACK)
    # Below, squares of fp32 numbers lose their relative precision.
    return torch.where(half < 1e-30, 0, half).float()


def _projection(mu: Tensor, axes: int, cells: int) -> Tensor:
    """The axes of the largest variance, scaled to cells: (axes, C + 1)."""
    centred = mu.double() - mu.double().mean(dim=0)
    covariance = centred.T @ centred / mu.shape[0]
    # Codes such as the corners of a cube have no preferred axes. An axis of the cube would see two values, a mixture sees many.
    generator = torch.Generator(device="cpu").manual_seed(0)
    mixture = torch.randn(mu.shape[1], mu.shape[1], dtype=torch.float64, generator=generator)
    largest = covariance.diagonal().max().clamp_min(1e-60)
    directions = torch.linalg.eigh(covariance / largest + 1e-3 * (mixture + mixture.T)).eigenvectors[:, -axes:].T
    along = mu.double() @ directions.T
    # The outer cells also take what lies beyond them. A sum of many channels has long, thin tails, which need no own cells.
    order = along.sort(dim=0).values
    low, high = order[len(mu) // 20], order[-1 - len(mu) // 20]
    scale = (cells - 2) / (high - low).clamp_min(1e-30)
    offset = 1 - low * scale
    return torch.cat((directions * scale[:, None], offset[:, None]), dim=1)


def _cell_lists(position: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """For each cell, the codes whose positions are near it, the nearest first: starts, members.

    Args:
        position: (K, A) in cells, fp64.
    """
    classes, axes = position.shape
    position = position.clamp(0, cells)
    most = max(_MOST_PAIRS, 32 * classes)
    width = 2
    while width < min(cells, 5) and (width + 1) ** axes * classes <= 4 * most:
        width += 1
    first = (position - width / 2).round().clamp(0, cells - width).long()
    window = torch.arange(width)
    # Squared distance from the code to each cell of its window along one axis; the sum over axes follows.
    low = first[:, :, None] + window
    gaps = (low - position[:, :, None]).clamp_min(0) + (position[:, :, None] - low - 1).clamp_min(0)
    gaps = gaps.square().float()
    found = []
    for part in torch.arange(classes).split(max(1, (1 << 20) // width**axes)):
        cell, code, gap = torch.zeros_like(part), part, torch.zeros(len(part), dtype=torch.float32)
        for axis in range(axes):
            gap = gap[:, None] + gaps[code, axis]
            # A window of `width` cells covers every cell within (width - 1) / 2 of the code.
            near = gap <= ((width - 1) / 2) ** 2
            cell = (cell[:, None] + low[code, axis] * cells**axis)[near]
            code = code[:, None].expand(-1, width)[near]
            gap = gap[near]
        found.append((cell, code, gap))
    cell, code, gap = (torch.cat(parts) for parts in zip(*found))
    if len(cell) > most:
        kept = (gap <= gap.kthvalue(most).values).nonzero()[:most, 0]
        cell, code, gap = cell[kept], code[kept], gap[kept]
    # The bits of floats that are not negative have the order of the floats.
    order = (cell << 32 | gap.view(torch.int32)).argsort(stable=True)
    starts = torch.zeros(cells**axes + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(cell, minlength=cells**axes).cumsum(0)
    return starts.int(), code[order].int()


def build_decode_guesses(centroids: Tensor) -> DecodeGuesses | None:
    """Build the tables of (K, C) fp32 centroids on the CPU; None if a full search is as fast."""
    classes, channels = centroids.shape
    if channels not in CHANNELS or classes < _FEWEST_CLASSES:
        return None
    mu = centroids.detach().cpu()
    if not float(mu.abs().max()) < 1e15:  # squares of distances stay finite
        return None
    axes, cells = (4, 16) if channels == 4 else (5, 8) if channels == 5 else (6, 8)
    rivals, distances = _rivals(mu, min(_RIVALS, classes - 1))
    projection = _projection(mu, axes, cells)
    starts, members = _cell_lists(mu.double() @ projection[:, :-1].T + projection[:, -1], cells)
    return DecodeGuesses(
        projection.float().contiguous(), starts, members, rivals.int().contiguous(), _certain(distances)
    )


def decode_guesses(derived: Derived) -> DecodeGuesses | None:
    """The guesses of codes with 4 to 16 channels; None if a full search is as fast."""

    def build() -> DecodeGuesses | None:
        # The caller's default device must not apply to the tensors that the tables are computed from.
        with torch.no_grad(), torch.device("cpu"):
            return build_decode_guesses(derived.codes.float())

    return derived.cached("decode guesses", build)
