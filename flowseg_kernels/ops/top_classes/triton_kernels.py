"""Triton kernels of the k best classes. A program takes one block of pixels and loops over the centroids.

The nearest classes of each pixel stay in registers, sorted, as N blocks of distances and N of classes. An entry that is still empty
holds NaN: every distance then comes before it, infinity too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.triton import INTERPRETED, aligned, assembly_for, compile_options, on_device_of, over_blocks, two_floats
from ..class_probabilities.triton_kernels import squared_distance, sum_exponentials, takes_reciprocals
from ..distance_correction.reference import TRANSFORMS
from ..distance_correction.triton_kernels import exponential_of, reciprocal_of, transformed
from ..triton_pixels import any_nan, block_of_program, combined, load_pixels, squared_norm

__all__ = ["top_classes"]

_GROUP: tl.constexpr = tl.constexpr(8)  # centroids per test of whether one of them is kept
_RUN: tl.constexpr = tl.constexpr(32)  # centroids per partial sum


@triton.jit
def _insert(d, k, squared, label, N: tl.constexpr):
    """Return the kept distances and classes with class k. An equal distance keeps its place: it belongs to a lower class."""
    found = ()
    classes = ()
    for j in tl.static_range(N):
        stays = d >= squared[j]
        if j == 0:
            found = found + (tl.where(stays, squared[0], d),)
            classes = classes + (tl.where(stays, label[0], k),)
        else:
            here = d >= squared[j - 1]
            found = found + (tl.where(stays, squared[j], tl.where(here, d, squared[j - 1])),)
            classes = classes + (tl.where(stays, label[j], tl.where(here, k, label[j - 1])),)
    return found, classes


@triton.jit
def _offer_group(x, centroids, first, count, eps, squared, label, C: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
                 ASSEMBLY: tl.constexpr):  # fmt: skip
    """Return the kept classes after `count` classes, at most _GROUP, and the sum of their weights 1 / (d + eps).

    The block decides together whether a class of the group is kept. Most groups have none, so they skip the insertion.
    """
    weights = tl.zeros_like(x[0])
    distances = ()
    kept = x[0] != x[0]
    for j in tl.static_range(_GROUP):
        # Past the last class: a distance of infinity comes after every class, as there are at least as many classes as entries
        # that are stored.
        is_class = count > j
        d = squared_distance(x, centroids + tl.where(is_class, first + j, 0) * C, C)
        if FAST:
            weights += tl.where(is_class, reciprocal_of(d + eps, ASSEMBLY), 0.0)
        kept = kept | (is_class & (d < squared[N - 1])) | (squared[N - 1] != squared[N - 1])
        distances = distances + (d,)
    if tl.max(kept.to(tl.int32), 0) > 0:
        for j in tl.static_range(_GROUP):
            if count > j:
                squared, label = _insert(distances[j], first + j, squared, label, N)
    return squared, label, weights


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "width", "pixels", "blocks", "classes", "kept", "ignore_index", "eps", "eps_low",
        "inverse_temperature", "inverse_temperature_low",
    ]
)  # fmt: skip
def _top_classes(
    x,  # (B, C, H, W)
    centroids,  # (K, C)
    labels, probabilities,  # (B, kept, H, W), contiguous
    # strides of x
    x_b, x_c, x_h, x_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, classes, kept, ignore_index,
    # numbers, each as the sum of two fp32 numbers
    eps, eps_low, inverse_temperature, inverse_temperature_low,
    X_LAYOUT: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TRANSFORM: tl.constexpr, FAST: tl.constexpr,
    ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    kept = tl.cast(kept, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    eps = combined(eps, eps_low, acc)
    inverse_temperature = combined(inverse_temperature, inverse_temperature_low, acc)
    squared = ()
    label = ()
    for _ in tl.static_range(N):
        squared = squared + (tl.full([BLOCK], float("nan"), acc),)
        label = label + (tl.zeros([BLOCK], tl.int32),)
    total = tl.zeros([BLOCK], acc)
    for start_of_run in range(0, classes, _RUN):
        run = tl.zeros([BLOCK], acc)
        for first in range(start_of_run, min(start_of_run + _RUN, classes), _GROUP):
            squared, label, weights = _offer_group(
                point, centroids, first, classes - first, eps, squared, label, C, N, FAST, ASSEMBLY
            )
            run += weights
        total += run
    # NaN for a pixel that is not finite or whose square overflows.
    poison = squared_norm(point, C) * 0.0
    largest = poison
    if not FAST:
        largest, _ = transformed(squared[0], eps, inverse_temperature, TRANSFORM)
        total = sum_exponentials(point, centroids, classes, eps, inverse_temperature, largest, C, TRANSFORM)
    share = 1.0 / total + poison
    unknown = any_nan(point, C)
    label_dtype: tl.constexpr = labels.dtype.element_ty
    for j in tl.static_range(N):
        if FAST:
            p = reciprocal_of(squared[j] + eps, ASSEMBLY) * share
        else:
            logit, _ = transformed(squared[j], eps, inverse_temperature, TRANSFORM)
            p = exponential_of(logit - largest, TRANSFORM) * share
        if kept > j:
            at = (image * kept + j) * pixels + start + tl.arange(0, BLOCK)
            found = tl.where(unknown, tl.cast(ignore_index, label_dtype), label[j].to(label_dtype))
            tl.store(labels + at, found, mask=inside)
            tl.store(probabilities + at, p, mask=inside)


def block_of(channels: int, entries: int, dtype: torch.dtype) -> int:
    """Return the pixels per program of 128 threads: the kept classes take 2 N registers per pixel."""
    if INTERPRETED:
        return 4096
    return 256 if channels <= 8 and entries <= 8 and dtype == torch.float32 else 128


def options_of(dtype: torch.dtype) -> dict[str, object]:
    """Return the compiler options. The bound on registers keeps ptxas from spilling in order to run more programs at once."""
    return compile_options(4, registers=232 if dtype == torch.float64 else 128)


def top_classes(
    x: torch.Tensor,
    centroids: torch.Tensor,
    k: int,
    temperature: float,
    eps: float,
    transform: str,
    out_dtype: str,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and probabilities (B, k, H, W), as reference.top_classes."""
    shape = (x.shape[0], k, x.shape[2], x.shape[3])
    labels = torch.empty(shape, dtype=getattr(torch, out_dtype), device=x.device)
    probabilities = torch.empty(shape, dtype=centroids.dtype, device=x.device)
    if labels.numel() == 0:
        return labels, probabilities
    channels, entries = x.shape[1], 4 if k <= 4 else 8 if k <= 8 else 16
    block = block_of(channels, entries, centroids.dtype)
    programs, sizes, layouts = over_blocks(block, X=x)
    with on_device_of(x):
        _top_classes[programs](
            x, aligned(centroids), labels, probabilities, *sizes, centroids.shape[0], k, ignore_index,
            *two_floats(eps), *two_floats(1 / temperature),
            **layouts, C=channels, N=entries, TRANSFORM=TRANSFORMS.index(transform),
            FAST=takes_reciprocals(temperature, eps, transform),
            ASSEMBLY=assembly_for(centroids.dtype), BLOCK=block, **options_of(centroids.dtype),
        )  # fmt: skip
    return labels, probabilities
