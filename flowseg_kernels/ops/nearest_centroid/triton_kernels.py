"""Triton kernels of decoding: label = argmin_k |x - mu_k|, ties to the lowest index.

If the codebook has a decode grid, a pixel reads its grid cell. The cell names one class that is nearest in the whole cell, or a
list of the few candidates. For a margin the grid is of order 2, so every list also has each candidate that can be second nearest.
Without a grid, and for pixels outside it, all centroids are searched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.checks import compute_dtype
from ...runtime.triton import INTERPRETED, aligned, assembly_for, compile_options, on_device_of, over_blocks
from ..triton_pixels import any_nan, block_of_program, gather_codes, load_pixels, load_row
from .triton_guesses import decode_by_guesses, guess_arguments
from .triton_search import search_all, squared_distance

__all__ = ["block_of", "decode", "grid_arguments", "nearest_centroid", "options_of"]

_RECORD: tl.constexpr = tl.constexpr(8)  # candidates per record of the decode grid


@triton.jit
def _keep_nearest_listed(x, code, j, place, nearest, second, MARGIN: tl.constexpr):
    d = squared_distance(x, code, 3)
    closer = d < nearest
    if MARGIN:
        second = tl.maximum(nearest, tl.minimum(d, second))
    return tl.where(closer, j, place), tl.where(closer, d, nearest), second


@triton.jit
def _search_lists(x, first, records, records_left, listed, MARGIN: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the nearest of each pixel's candidates, and the smallest and (with MARGIN) second smallest squared distance.

    `first` is the first record of the pixel's list, 0 for pixels without one.
    """
    length = tl.load(records_left + first, mask=listed, other=0)
    place = first * (4 * _RECORD)
    nearest = tl.full(first.shape, float("inf"), tl.float32)
    second = nearest
    point = x
    for r in range(0, tl.max(length, 0)):
        # Pixels with a shorter list than the block's longest read their last record again. That changes no minimum. A candidate
        # must not be second to itself, so for a margin the pixel moves to infinity. Padding is at the other infinity.
        if MARGIN:
            point = (tl.where(r < length, x[0], float("-inf")), x[1], x[2])
        at = first + tl.maximum(tl.minimum(r, length - 1), 0)
        record = records + at * (4 * _RECORD)
        for half in tl.static_range(2):
            a = load_row(record + 4 * half, 4, ASSEMBLY)
            b = load_row(record + _RECORD + 4 * half, 4, ASSEMBLY)
            c = load_row(record + 2 * _RECORD + 4 * half, 4, ASSEMBLY)
            for j in tl.static_range(4):
                # Keep the candidate's place and read its class once at the end. Lists are sorted by class, so ties stay right.
                here = at * (4 * _RECORD) + 4 * half + j
                code = (a[j], b[j], c[j])
                place, nearest, second = _keep_nearest_listed(point, code, here, place, nearest, second, MARGIN)
    return tl.load(records + 3 * _RECORD + place).to(tl.int32), nearest, second


@triton.jit
def _look_up(
    x, inside, centroids, classes, cells, records, records_left, grid_low, grid_scale,
    SIZE: tl.constexpr, MARGIN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return labels from the decode grid and, with MARGIN, the two smallest squared distances.

    flowseg_kernels/decode_grid.py explains why they are exact.
    """
    a = (x[0] - grid_low) * grid_scale
    b = (x[1] - grid_low) * grid_scale
    c = (x[2] - grid_low) * grid_scale
    # False also for NaN.
    in_grid = (a >= 0) & (a < SIZE) & (b >= 0) & (b < SIZE) & (c >= 0) & (c < SIZE)
    a = tl.where(in_grid, a, 0.0).to(tl.int32)
    b = tl.where(in_grid, b, 0.0).to(tl.int32)
    c = tl.where(in_grid, c, 0.0).to(tl.int32)
    label = tl.load(cells + (c * SIZE + b) * SIZE + a)
    listed = in_grid & (label < 0)
    nearest = x[0]
    second = x[0]
    if tl.max(listed.to(tl.int32), 0) > 0:
        first = tl.where(listed, -1 - label, 0)
        found, nearest, second = _search_lists(x, first, records, records_left, listed, MARGIN, ASSEMBLY)
        label = tl.where(listed, found, label)
    outside = inside & ~in_grid
    if tl.max(outside.to(tl.int32), 0) > 0:
        found, smallest, second_smallest = search_all(x, centroids, classes, 3, MARGIN, ASSEMBLY)
        label = tl.where(outside, found, label)
        nearest = tl.where(outside, smallest, nearest)
        second = tl.where(outside, second_smallest, second)
    return label, nearest, second


@triton.jit
def decode(
    x, inside, centroids, classes, cells, records, records_left, grid_low, grid_scale, guesses,
    C: tl.constexpr, GRID_SIZE: tl.constexpr, AXES: tl.constexpr, LOG2_CELLS: tl.constexpr, MARGIN: tl.constexpr,
    ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return labels (-1 for NaN), smallest and second smallest squared distances.

    GRID_SIZE > 0 uses the decode grid, AXES > 0 the guesses; otherwise all centroids are searched. Without MARGIN the two distances
    of a grid are meaningless. The second distance of guesses always is.
    """
    if GRID_SIZE > 0:
        label, nearest, second = _look_up(
            x, inside, centroids, classes, cells, records, records_left, grid_low, grid_scale,
            GRID_SIZE, MARGIN, ASSEMBLY,
        )  # fmt: skip
    elif AXES > 0:
        label, nearest = decode_by_guesses(x, inside, centroids, classes, guesses, AXES, LOG2_CELLS, C, ASSEMBLY, BLOCK)
        second = nearest
    else:
        label, nearest, second = search_all(x, centroids, classes, C, MARGIN, ASSEMBLY)
    return tl.where(any_nan(x, C), -1, label), nearest, second


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "width", "pixels", "blocks", "rival_count", "classes", "ignore_index", "grid_low", "grid_scale",
    ]
)  # fmt: skip
def _nearest_centroid(
    x,  # (B, C, H, W)
    centroids,  # (K, C)
    # decode grid, as flowseg_kernels/decode_grid.py lays it out
    cells, records, records_left,
    # guesses, as flowseg_kernels/decode_guesses.py lays them out
    projection, starts, members, rivals, certain, rival_count,
    # results (B, H, W), contiguous
    labels, distance, margin,
    # strides of x
    x_b, x_c, x_h, x_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, classes, ignore_index,
    grid_low, grid_scale,
    X_LAYOUT: tl.constexpr, C: tl.constexpr, GRID_SIZE: tl.constexpr, AXES: tl.constexpr, LOG2_CELLS: tl.constexpr,
    DISTANCE: tl.constexpr, MARGIN: tl.constexpr, ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    label, nearest, second = decode(
        point, inside, centroids, classes, cells, records, records_left, grid_low, grid_scale,
        (projection, starts, members, rivals, certain, rival_count), C, GRID_SIZE, AXES, LOG2_CELLS, MARGIN, ASSEMBLY, BLOCK,
    )  # fmt: skip
    at = image * pixels + start + tl.arange(0, BLOCK)
    unknown = label < 0
    label_dtype: tl.constexpr = labels.dtype.element_ty
    tl.store(labels + at, tl.where(unknown, tl.cast(ignore_index, label_dtype), label.to(label_dtype)), mask=inside)
    if DISTANCE or MARGIN:
        if GRID_SIZE > 0 and not MARGIN:
            nearest = squared_distance(point, gather_codes(centroids, label, C), C)
        root = tl.where(unknown, float("nan"), tl.sqrt(nearest))
        if DISTANCE:
            tl.store(distance + at, root, mask=inside)
        if MARGIN:
            tl.store(margin + at, tl.sqrt(second) - root, mask=inside)


def options_of(dtype: torch.dtype, uses_guesses: bool, registers: int = 96) -> dict[str, object]:
    """Return the compiler options. The bound on registers keeps ptxas from spilling in order to run more programs at once."""
    return compile_options(
        1 if uses_guesses else 4, registers=128 if dtype == torch.float64 or uses_guesses else registers
    )


def block_of(channels: int, uses_grid: bool, uses_guesses: bool, margin: bool = False) -> int:
    """Return the pixels per program, of 128 threads, or of 32 with guesses.

    The pixels of a thread share each centroid it loads: four pixels, fewer for many channels. A grid look-up always takes four,
    to have many loads in flight, or two for a margin, as four would spill registers.
    """
    if INTERPRETED:
        return 4096
    if uses_guesses:
        return 128 if channels <= 8 else 64
    if uses_grid and margin:
        return 256
    return 512 if channels <= 4 or uses_grid else 256 if channels <= 8 else 128


def grid_arguments(centroids: torch.Tensor, tables: list[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], int]:
    """Return the decode grid's tensors and its size. Without a grid the size is 0 and the tensors are placeholders."""
    if len(tables) != 3 or centroids.dtype != torch.float32 or centroids.shape[1] != 3:
        return (centroids, centroids, centroids), 0
    cells, records, records_left = tables
    return (cells, aligned(records), records_left), cells.shape[-1]


def nearest_centroid(
    x: torch.Tensor,
    centroids: torch.Tensor,
    tables: list[torch.Tensor],
    grid_low: float,
    grid_scale: float,
    out_dtype: str,
    return_distance: bool,
    return_margin: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return labels, distances and margins, each (B, H, W) or empty, as reference.nearest_centroid."""
    batch, channels, height, width = x.shape
    shape = (batch, height, width)
    dtype = compute_dtype(x.dtype)
    labels = torch.empty(shape, dtype=getattr(torch, out_dtype), device=x.device)
    distance = torch.empty(shape if return_distance else (0,), dtype=dtype, device=x.device)
    margin = torch.empty(shape if return_margin else (0,), dtype=dtype, device=x.device)
    if labels.numel() == 0:
        return labels, distance, margin
    centroids = aligned(centroids)
    grid, size = grid_arguments(centroids, tables)
    # The guesses do not find the second nearest code.
    guesses, axes = guess_arguments(centroids, [] if return_margin else tables)
    uses_guesses = axes["AXES"] > 0
    block = block_of(channels, size > 0, uses_guesses, return_margin)
    programs, sizes, layouts = over_blocks(block, X=x)
    with on_device_of(x):
        _nearest_centroid[programs](
            x, centroids, *grid, *guesses, labels, distance, margin, *sizes, centroids.shape[0], ignore_index,
            grid_low, grid_scale, **layouts, C=channels, GRID_SIZE=size, **axes, DISTANCE=return_distance,
            MARGIN=return_margin, ASSEMBLY=assembly_for(centroids.dtype), BLOCK=block,
            **options_of(centroids.dtype, uses_guesses),
        )  # fmt: skip
    return labels, distance, margin
