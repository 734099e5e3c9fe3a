"""Triton functions that compare pixels with every centroid."""

import triton
import triton.language as tl

from ..triton_pixels import load_code, load_row

__all__ = ["search_all", "squared_distance"]

_UNROLLED: tl.constexpr = tl.constexpr(8)  # centroids per iteration of the search


@triton.jit
def squared_distance(x, code, C: tl.constexpr):
    """Return |x - code|^2. The multiply-adds are explicit, so all functions that compare codes round alike."""
    difference = x[0] - code[0]
    total = difference * difference
    for c in tl.static_range(1, C):
        difference = x[c] - code[c]
        total = tl.fma(difference, difference, total)
    return total


@triton.jit
def _keep_nearest(x, code, k, label, nearest, second, C: tl.constexpr, MARGIN: tl.constexpr):
    d = squared_distance(x, code, C)
    closer = d < nearest
    if MARGIN:
        second = tl.where(closer, nearest, tl.where(d < second, d, second))
    return tl.where(closer, k, label), tl.where(closer, d, nearest), second


@triton.jit
def search_all(x, centroids, classes, C: tl.constexpr, MARGIN: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the label, the smallest and (with MARGIN) the second smallest squared distance over all centroids.

    Centroids are compared in the order of their index, so the lowest index wins a tie.
    """
    label = tl.zeros(x[0].shape, tl.int32)
    nearest = tl.full(x[0].shape, float("inf"), x[0].dtype)
    second = nearest
    whole = classes // _UNROLLED * _UNROLLED
    centroid = centroids
    for first in range(0, whole, _UNROLLED):
        codes = ()
        for j in tl.static_range(_UNROLLED):
            code, codes = load_code(centroid, j, codes, C, ASSEMBLY)
            label, nearest, second = _keep_nearest(x, code, first + j, label, nearest, second, C, MARGIN)
        centroid += _UNROLLED * C
    for k in range(whole, classes):
        code = load_row(centroid, C, "plain")
        label, nearest, second = _keep_nearest(x, code, k, label, nearest, second, C, MARGIN)
        centroid += C
    return label, nearest, second
