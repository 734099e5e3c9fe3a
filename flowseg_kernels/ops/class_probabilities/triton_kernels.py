"""Triton kernels of class probabilities. A program takes one block of pixels and loops over the centroids.

The first passes find the normaliser, the last one writes a row of the block for each class. TRANSFORM and FORM are indices of
TRANSFORMS and FORMS. FAST: neg_log at temperature 1, where p_k is proportional to 1 / (d_k + eps).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.triton import INTERPRETED, aligned, assembly_for, compile_options, on_device_of, over_blocks, two_floats
from ..distance_correction.reference import TRANSFORMS
from ..distance_correction.triton_kernels import exponential_of, reciprocal_of, transformed
from ..nearest_centroid.triton_search import squared_distance as distance_of_search
from ..triton_pixels import block_of_program, combined, load_pixels, load_row, squared_norm
from .reference import FORMS

__all__ = ["class_probabilities", "squared_distance", "sum_exponentials", "sum_weights", "takes_reciprocals"]

_RUN: tl.constexpr = tl.constexpr(32)  # centroids per partial sum
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def squared_distance(x, centroid, C: tl.constexpr):
    """Return |x - mu|^2 for the centroid mu that the pointer `centroid` points to, with the bits of nearest_centroid."""
    return distance_of_search(x, load_row(centroid, C, "plain"), C)


@triton.jit
def sum_weights(x, centroids, classes, eps, C: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the sum of 1 / (d_k + eps). Adding up partial sums keeps fp32 sums as accurate as pairwise summation."""
    total = tl.zeros_like(x[0])
    for first in range(0, classes, _RUN):
        run = tl.zeros_like(x[0])
        for k in range(first, min(first + _RUN, classes)):
            run += reciprocal_of(squared_distance(x, centroids + k * C, C) + eps, ASSEMBLY)
        total += run
    return total


@triton.jit
def sum_exponentials(
    x, centroids, classes, eps, inverse_temperature, largest, C: tl.constexpr, TRANSFORM: tl.constexpr
):
    """Return the sum of exp(logit_k - largest)."""
    total = tl.zeros_like(x[0])
    for first in range(0, classes, _RUN):
        run = tl.zeros_like(x[0])
        for k in range(first, min(first + _RUN, classes)):
            d = squared_distance(x, centroids + k * C, C)
            logit, _ = transformed(d, eps, inverse_temperature, TRANSFORM)
            run += exponential_of(logit - largest, TRANSFORM)
        total += run
    return total


@triton.jit
def _natural(logit, TRANSFORM: tl.constexpr):
    """Convert logits of `transformed`, which uses log2 for neg_log, to base e."""
    if TRANSFORM == 0:
        return logit * _LN2
    else:
        return logit


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "width", "pixels", "blocks", "classes", "eps", "eps_low", "inverse_temperature",
        "inverse_temperature_low",
    ]
)  # fmt: skip
def _class_probabilities(
    x,  # (B, C, H, W)
    centroids,  # (K, C)
    out,  # (B, K, H, W), contiguous
    # strides of x
    x_b, x_c, x_h, x_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, classes,
    # numbers, each as the sum of two fp32 numbers
    eps, eps_low, inverse_temperature, inverse_temperature_low,
    X_LAYOUT: tl.constexpr, C: tl.constexpr, TRANSFORM: tl.constexpr, FORM: tl.constexpr, FAST: tl.constexpr,
    ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    eps = combined(eps, eps_low, acc)
    inverse_temperature = combined(inverse_temperature, inverse_temperature_low, acc)
    # NaN for a pixel that is not finite or whose square overflows.
    poison = squared_norm(point, C) * 0.0
    shift = poison
    share = poison
    if FAST:
        share = 1.0 / sum_weights(point, centroids, classes, eps, C, ASSEMBLY) + poison
    elif FORM != 2:
        smallest = tl.full([BLOCK], float("inf"), acc)
        for k in range(0, classes):
            d = squared_distance(point, centroids + k * C, C)
            smallest = tl.where(d < smallest, d, smallest)
        largest, _ = transformed(smallest, eps, inverse_temperature, TRANSFORM)
        total = sum_exponentials(point, centroids, classes, eps, inverse_temperature, largest, C, TRANSFORM)
        if FORM == 0:
            shift = largest
            share = 1.0 / total + poison
        else:
            shift = _natural(largest, TRANSFORM) + tl.log(total) + poison
    at = out + image * classes * pixels + start + tl.arange(0, BLOCK)
    for k in range(0, classes):
        d = squared_distance(point, centroids + k * C, C)
        if FAST:
            value = reciprocal_of(d + eps, ASSEMBLY) * share
        else:
            logit, _ = transformed(d, eps, inverse_temperature, TRANSFORM)
            if FORM == 0:
                value = exponential_of(logit - shift, TRANSFORM) * share
            else:
                value = _natural(logit, TRANSFORM) - shift
        tl.store(at, value, mask=inside)
        at += pixels


def takes_reciprocals(temperature: float, eps: float, transform: str) -> bool:
    """Whether p_k is computed as r_k / sum r with r_k = 1 / (d_k + eps); csrc/shared/probabilities.h explains the bound on eps."""
    return transform == "neg_log" and temperature == 1 and eps >= 1e-30


def block_of(channels: int, dtype: torch.dtype) -> int:
    """Return the pixels per program of 128 threads. The pixels of a thread share each centroid it loads."""
    if INTERPRETED:
        return 4096
    return 256 if channels <= 8 and dtype == torch.float32 else 128


def class_probabilities(
    x: torch.Tensor, centroids: torch.Tensor, temperature: float, eps: float, transform: str, form: str
) -> torch.Tensor:
    """Return (B, K, H, W), as reference.class_probabilities."""
    out = torch.empty((x.shape[0], centroids.shape[0], x.shape[2], x.shape[3]), dtype=centroids.dtype, device=x.device)
    if out.numel() == 0:
        return out
    channels = x.shape[1]
    block = block_of(channels, centroids.dtype)
    programs, sizes, layouts = over_blocks(block, X=x)
    fast = form == "probabilities" and takes_reciprocals(temperature, eps, transform)
    with on_device_of(x):
        _class_probabilities[programs](
            x, aligned(centroids), out, *sizes, centroids.shape[0], *two_floats(eps), *two_floats(1 / temperature),
            **layouts, C=channels, TRANSFORM=TRANSFORMS.index(transform), FORM=FORMS.index(form), FAST=fast,
            ASSEMBLY=assembly_for(centroids.dtype), BLOCK=block, **compile_options(4),
        )  # fmt: skip
    return out
