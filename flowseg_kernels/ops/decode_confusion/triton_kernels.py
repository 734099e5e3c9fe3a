"""Triton kernel of decode_confusion: decode, then count (truth, prediction) pairs. No label map is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.triton import aligned, assembly_for, on_device_of, over_blocks
from ..nearest_centroid.triton_kernels import block_of, decode, grid_arguments, options_of
from ..triton_pixels import block_of_program, load_classes, load_pixels

__all__ = ["decode_confusion"]

# A block first counts this many distinct pairs with one atomic each. The pixels left over take one atomic each.
_ROUNDS: tl.constexpr = tl.constexpr(4)


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "l_b", "l_h", "l_w", "width", "pixels", "blocks", "classes", "ignore_index", "grid_low",
        "grid_scale",
    ]
)  # fmt: skip
def _decode_confusion(
    x,  # (B, C, H, W)
    target,  # (B, H, W)
    centroids,  # (K, C)
    # decode grid, as flowseg_kernels/decode_grid.py lays it out
    cells, records, records_left,
    counts,  # (K, K) int64
    # strides of x and of target
    x_b, x_c, x_h, x_w, l_b, l_h, l_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, classes, ignore_index,
    grid_low, grid_scale,
    X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, C: tl.constexpr, GRID_SIZE: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    y = load_classes(target, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    label, _, _ = decode(
        point, inside, centroids, classes, cells, records, records_left, grid_low, grid_scale, C, GRID_SIZE, False, ASSEMBLY
    )  # fmt: skip
    pair = tl.where((y >= 0) & (label >= 0), y.to(tl.int64) * classes + label, -1)
    # Label maps are piecewise constant, so a few pairs make up most blocks.
    for _ in tl.static_range(_ROUNDS):
        most = tl.max(pair, 0)
        same = pair == most
        tl.atomic_add(counts + most, tl.sum(same.to(tl.int64), 0), mask=most >= 0, sem="relaxed")
        pair = tl.where(same, -1, pair)
    tl.atomic_add(counts + pair, tl.full([BLOCK], 1, tl.int64), mask=pair >= 0, sem="relaxed")


def decode_confusion(
    x: torch.Tensor,
    target: torch.Tensor,
    centroids: torch.Tensor,
    tables: list[torch.Tensor],
    grid_low: float,
    grid_scale: float,
    ignore_index: int,
) -> torch.Tensor:
    """Return counts[truth, prediction] (K, K). Integer sums do not depend on the order of the atomics."""
    channels, classes = x.shape[1], centroids.shape[0]
    counts = torch.zeros((classes, classes), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return counts
    centroids = aligned(centroids)
    grid, size = grid_arguments(centroids, tables)
    block = block_of(channels, size > 0)
    programs, sizes, layouts = over_blocks(block, X=x, L=target)
    with on_device_of(x):
        _decode_confusion[programs](
            x, target, centroids, *grid, counts, *sizes, classes, ignore_index, grid_low, grid_scale,
            **layouts, C=channels, GRID_SIZE=size, ASSEMBLY=assembly_for(centroids.dtype), BLOCK=block,
            **options_of(centroids.dtype, registers=128),
        )  # fmt: skip
    return counts
