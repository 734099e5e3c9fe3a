"""Triton kernel of decode_confusion: decode, then count, by class or by pair (truth, prediction). No label map is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.triton import aligned, assembly_for, on_device_of, over_blocks
from ..nearest_centroid.triton_guesses import guess_arguments
from ..nearest_centroid.triton_kernels import block_of, decode, grid_arguments, options_of
from ..triton_pixels import block_of_program, load_classes, load_pixels

__all__ = ["decode_confusion"]

# A block first counts this many distinct pairs with one atomic each. The pixels left over take one atomic each.
_ROUNDS: tl.constexpr = tl.constexpr(4)


@triton.jit
def _add(counts, pair, n, classes, BY_CLASS: tl.constexpr):
    """Count a pair n times; -1 is none. By class, the truth is in the upper half of the pair's bits."""
    if BY_CLASS:
        truth, label = pair >> 32, pair & 0x7FFFFFFF
        tl.atomic_add(counts + truth, n, mask=(pair >= 0) & (truth == label), sem="relaxed")
        tl.atomic_add(counts + classes + truth, n, mask=pair >= 0, sem="relaxed")
        tl.atomic_add(counts + 2 * classes + label, n, mask=pair >= 0, sem="relaxed")
    else:
        tl.atomic_add(counts + pair, n, mask=pair >= 0, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "l_b", "l_h", "l_w", "width", "pixels", "blocks", "rival_count", "classes", "ignore_index",
        "grid_low", "grid_scale",
    ]
)  # fmt: skip
def _decode_confusion(
    x,  # (B, C, H, W)
    target,  # (B, H, W)
    centroids,  # (K, C)
    # decode grid, as flowseg_kernels/decode_grid.py lays it out
    cells, records, records_left,
    # guesses, as flowseg_kernels/decode_guesses.py lays them out
    projection, starts, members, rivals, certain, rival_count,
    counts,  # (K, K) int64, or (3, K) by class
    # strides of x and of target
    x_b, x_c, x_h, x_w, l_b, l_h, l_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, classes, ignore_index,
    grid_low, grid_scale,
    X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, C: tl.constexpr, GRID_SIZE: tl.constexpr, AXES: tl.constexpr,
    LOG2_CELLS: tl.constexpr, BY_CLASS: tl.constexpr, ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    y = load_classes(target, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    label, _, _ = decode(
        point, inside, centroids, classes, cells, records, records_left, grid_low, grid_scale,
        (projection, starts, members, rivals, certain, rival_count), C, GRID_SIZE, AXES, LOG2_CELLS, False, ASSEMBLY, BLOCK,
    )  # fmt: skip
    pair = y.to(tl.int64)
    pair = (pair << 32 | label) if BY_CLASS else (pair * classes + label)
    pair = tl.where((y >= 0) & (label >= 0), pair, -1)
    # Label maps are piecewise constant, so a few pairs make up most blocks.
    for _ in tl.static_range(_ROUNDS):
        most = tl.max(pair, 0)
        same = pair == most
        _add(counts, most, tl.sum(same.to(tl.int64), 0), classes, BY_CLASS)
        pair = tl.where(same, -1, pair)
    _add(counts, pair, tl.full([BLOCK], 1, tl.int64), classes, BY_CLASS)


def decode_confusion(
    x: torch.Tensor,
    target: torch.Tensor,
    centroids: torch.Tensor,
    tables: list[torch.Tensor],
    grid_low: float,
    grid_scale: float,
    by_class: bool,
    ignore_index: int,
) -> torch.Tensor:
    """Return counts as reference.decode_confusion. Integer sums do not depend on the order of the atomics."""
    channels, classes = x.shape[1], centroids.shape[0]
    counts = torch.zeros((3 if by_class else classes, classes), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return counts
    centroids = aligned(centroids)
    grid, size = grid_arguments(centroids, tables)
    guesses, axes = guess_arguments(centroids, tables)
    uses_guesses = axes["AXES"] > 0
    block = block_of(channels, size > 0, uses_guesses)
    programs, sizes, layouts = over_blocks(block, X=x, L=target)
    with on_device_of(x):
        _decode_confusion[programs](
            x, target, centroids, *grid, *guesses, counts, *sizes, classes, ignore_index, grid_low, grid_scale,
            **layouts, C=channels, GRID_SIZE=size, **axes, BY_CLASS=by_class, ASSEMBLY=assembly_for(centroids.dtype),
            BLOCK=block, **options_of(centroids.dtype, uses_guesses, registers=128),
        )  # fmt: skip
    return counts
