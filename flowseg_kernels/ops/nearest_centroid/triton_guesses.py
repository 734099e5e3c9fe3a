"""Triton functions that decode by guesses. flowseg_kernels/decode_guesses.py describes the tables and proves the results.

The pixels of a program try the members of their cells together, until every pixel is proved. A program is one warp, so that few
pixels wait for each other. What remains unproved is searched: a few pixels one after the other, with all threads on one pixel's
codes, many pixels together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.triton import INTERPRETED, aligned
from ..triton_pixels import any_nan, load_row
from .triton_search import search_all, squared_distance

__all__ = ["decode_by_guesses", "guess_arguments"]

_MOST_TRIED: tl.constexpr = tl.constexpr(8)  # members of a cell
_NOISE_AFTER: tl.constexpr = tl.constexpr(2)  # members, after which a mostly unproved program gives up
#: At most one in so many pixels is searched on its own. The interpreter searches a large block of pixels as fast as one pixel.
_ONE_BY_ONE: tl.constexpr = tl.constexpr(64 if INTERPRETED else 16)


@triton.jit
def _number(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _distance(x, centroids, k, C: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the squared distance of each pixel to its own class k, which is valid."""
    return squared_distance(x, load_row(centroids + k * C, C, ASSEMBLY), C)


@triton.jit
def _cell_of(x, projection, AXES: tl.constexpr, LOG2_CELLS: tl.constexpr, C: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the cells of pixels. Any cell will do for NaN and infinity."""
    last: tl.constexpr = (1 << LOG2_CELLS) - 1
    cell = tl.zeros(x[0].shape, tl.int32)
    for a in tl.static_range(AXES):
        row = load_row(projection + a * (C + 1), C + 1, ASSEMBLY)
        at = x[0] * row[0] + row[C]
        for c in tl.static_range(1, C):
            at += x[c] * row[c]
        # False also for NaN.
        at = tl.where(at > 0, at, 0.0)
        at = tl.where(at < last, at, last)
        cell += at.to(tl.int32) << (a * LOG2_CELLS)
    return cell


@triton.jit
def _try_members(
    x, pending, centroids, projection, starts, members, certain, rival_count,
    AXES: tl.constexpr, LOG2_CELLS: tl.constexpr, C: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the nearest member of each cell, its squared distance, and the pixels still pending.

    A pixel stops at the member that `certain` proves to be nearest of all.
    """
    cell = _cell_of(x, projection, AXES, LOG2_CELLS, C, ASSEMBLY)
    first = tl.load(starts + cell)
    count = tl.load(starts + cell + 1) - first
    label = tl.zeros(x[0].shape, tl.int32)
    nearest = tl.full(x[0].shape, float("inf"), tl.float32)
    tried = 0
    trying = pending & (count > 0)
    left = _number(trying)
    while (tried < _MOST_TRIED) & (left > 0):
        k = tl.load(members + (first + tried), mask=trying, other=0)
        d = _distance(x, centroids, k, C, ASSEMBLY)
        closer = trying & (d < nearest)
        label = tl.where(closer, k, label)
        nearest = tl.where(closer, d, nearest)
        pending = pending & ~(trying & (d < tl.load(certain + k * (rival_count + 1))))
        tried += 1
        trying = pending & (tried < count)
        left = _number(trying)
        # Noise: most pixels are far from all codes.
        if (tried == _NOISE_AFTER) & (left > x[0].shape[0] * 3 // 4):
            left = 0
    return label, nearest, pending


@triton.jit
def _compare_rivals(
    x, comparing, label, nearest, centroids, rivals, certain, rival_count, C: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """Compare guesses with their rivals until `certain` excludes the other classes. Return labels and squared distances.

    comparing: pixels whose `nearest` is below the last column of `certain`, which ends the loop.
    """
    guess = label
    bound = nearest
    compared = 0
    while _number(comparing) > 0:
        k = tl.load(rivals + (guess * rival_count + compared), mask=comparing, other=0)
        d = _distance(x, centroids, k, C, ASSEMBLY)
        # Ties go to the lowest class.
        closer = comparing & ((d < nearest) | ((d == nearest) & (k < label)))
        label = tl.where(closer, k, label)
        nearest = tl.where(closer, d, nearest)
        compared += 1
        excluded = tl.load(certain + (guess * (rival_count + 1) + compared), mask=comparing, other=0.0)
        comparing = comparing & ~(bound < excluded)
    return label, nearest


@triton.jit
def _search_one(x, pixel, centroids, classes, C: tl.constexpr, ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr):
    """Return the nearest class and the squared distance of one pixel of the block: search_all with each thread on other codes."""
    lane = tl.arange(0, BLOCK)
    point = ()
    for c in tl.static_range(C):
        point = point + (tl.sum(tl.where(lane == pixel, x[c], 0.0), 0),)
    label = tl.zeros([BLOCK], tl.int32)
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, classes, BLOCK):
        # Lanes past the end compare the last class, which changes nothing.
        k = tl.minimum(start + lane, classes - 1)
        d = _distance(point, centroids, k, C, ASSEMBLY)
        closer = d < nearest
        label = tl.where(closer, k, label)
        nearest = tl.where(closer, d, nearest)
    smallest = tl.min(nearest, 0)
    # All distances are infinite for a pixel with an infinite coordinate. Then all lanes still have label 0.
    return tl.min(tl.where(nearest == smallest, label, classes), 0), smallest


@triton.jit
def decode_by_guesses(
    x, inside, centroids, classes, guesses,
    AXES: tl.constexpr, LOG2_CELLS: tl.constexpr, C: tl.constexpr, ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the labels and smallest squared distances of search_all; for NaN any label.

    guesses: (projection, starts, members, rivals, certain, number of rivals per class).
    """
    projection, starts, members, rivals, certain, rival_count = guesses
    label, nearest, pending = _try_members(
        x, inside & ~any_nan(x, C), centroids, projection, starts, members, certain, rival_count,
        AXES, LOG2_CELLS, C, ASSEMBLY,
    )  # fmt: skip
    if _number(pending) > 0:
        comparing = pending & (nearest < tl.load(certain + (label * (rival_count + 1) + rival_count)))
        pending = pending & ~comparing
        left = _number(pending)
        if left > BLOCK // _ONE_BY_ONE:
            found, smallest, _ = search_all(x, centroids, classes, C, False, ASSEMBLY)
            pending = pending | comparing
            label = tl.where(pending, found, label)
            nearest = tl.where(pending, smallest, nearest)
        else:
            label, nearest = _compare_rivals(
                x, comparing, label, nearest, centroids, rivals, certain, rival_count, C, ASSEMBLY
            )
            lane = tl.arange(0, BLOCK)
            while left > 0:
                pixel = tl.min(tl.where(pending, lane, BLOCK), 0)
                found, smallest = _search_one(x, pixel, centroids, classes, C, ASSEMBLY, BLOCK)
                label = tl.where(lane == pixel, found, label)
                nearest = tl.where(lane == pixel, smallest, nearest)
                pending = pending & (lane != pixel)
                left -= 1
    return label, nearest


def guess_arguments(
    centroids: torch.Tensor, tables: list[torch.Tensor]
) -> tuple[tuple[torch.Tensor | int, ...], dict[str, int]]:
    """Return the tensors of the guesses with the number of rivals, and the kernels' constants.

    Without guesses AXES is 0 and the tensors are placeholders.
    """
    if len(tables) != 5 or centroids.dtype != torch.float32:
        return (*[centroids] * 5, 0), {"AXES": 0, "LOG2_CELLS": 0}
    projection, starts, *_, rivals, _ = tables
    axes = projection.shape[0]
    # starts has G^axes + 1 elements, and G is a power of two.
    log2_cells = ((len(starts) - 1).bit_length() - 1) // axes
    return (aligned(projection), *tables[1:], rivals.shape[1]), {"AXES": axes, "LOG2_CELLS": log2_cells}
