"""Triton kernel of decode_confusion: decode, then count (truth, prediction) pairs; no label map is stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...runtime.triton_forms import VECTOR, Variant, aligned, machine_form, on_device_of, over_blocks, variant
from ..nearest_centroid.triton_kernels import block_of, decode, grid_arguments, options_of
from ..triton_pixels import block_of_program, load_classes, load_pixels

__all__ = ["decode_confusion", "variants"]

# Pairs that a block counts by itself before it leaves the rest to one atomic a pixel.
_ROUNDS: tl.constexpr = tl.constexpr(4)


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "l_b", "l_h", "l_w", "width", "pixels", "blocks", "classes", "ignore_index", "grid_low",
        "grid_scale",
    ]
)  # fmt: skip
def _decode_confusion(
    x, target, centroids, cells, records, groups, counts,
    x_b, x_c, x_h, x_w, l_b, l_h, l_w, width, pixels, blocks, classes, ignore_index, grid_low, grid_scale,
    X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, C: tl.constexpr, GRID_SIZE: tl.constexpr, FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    y = load_classes(target, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    label, _, _ = decode(
        point, inside, centroids, classes, cells, records, groups, grid_low, grid_scale, C, GRID_SIZE, False, FORM
    )
    pair = tl.where((y >= 0) & (label >= 0), y.to(tl.int64) * classes + label, -1)
    # Label maps are piecewise constant: a few pairs make up most blocks, and one atomic for each of them does.
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
    cells: torch.Tensor | None,
    records: torch.Tensor | None,
    groups: torch.Tensor | None,
    grid_low: float,
    grid_scale: float,
    ignore_index: int,
) -> torch.Tensor:
    """counts[truth, prediction], as the reference gives them. Integers: the order of the atomics does not matter."""
    channels, classes = x.shape[1], centroids.shape[0]
    counts = torch.zeros((classes, classes), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return counts
    centroids = aligned(centroids)
    grid, size = grid_arguments(centroids, cells, records, groups)
    block = block_of(channels, size > 0)
    programs, sizes, layouts = over_blocks(block, X=x, L=target)
    with on_device_of(x):
        _decode_confusion[programs](
            x, target, centroids, *grid, counts, *sizes, classes, ignore_index, grid_low, grid_scale,
            **layouts, C=channels, GRID_SIZE=size, FORM=machine_form(centroids.dtype), BLOCK=block,
            **options_of(centroids.dtype, registers=128),
        )  # fmt: skip
    return counts


def variants() -> Iterator[Variant]:
    for channels, grid, dtype in ((3, 64, "bf16"), (3, 0, "fp64"), (8, 0, "fp32"), (16, 0, "bf16")):
        pointers = {
            "x": dtype, "target": "u8", "centroids": "fp64" if dtype == "fp64" else "fp32", "cells": "i32", "records": "fp32",
            "groups": "i32", "counts": "i64",
        }  # fmt: skip
        constants = {
            "X_LAYOUT": VECTOR, "L_LAYOUT": VECTOR, "C": channels, "GRID_SIZE": grid,
            "FORM": "plain" if dtype == "fp64" else "ptx", "BLOCK": block_of(channels, grid > 0),
        }  # fmt: skip
        form = "grid " if grid else ""
        yield variant(
            f"decode_confusion C={channels} {form}{dtype}",
            _decode_confusion,
            pointers,
            constants,
            options_of(torch.float64 if dtype == "fp64" else torch.float32, registers=128),
        )
