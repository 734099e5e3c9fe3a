"""Triton kernels of the distance-aware correction. Formulas and their order match csrc/shared/correction.h.

A program takes one block of pixels of one image and loops over the centroids, which every thread reads from the cache. Its state
is C + 1 sums per pixel; no array over K is ever stored.

"Own" is the pixel's labelled class y; "rivals" are all other classes. TRANSFORM is an index of reference.TRANSFORMS.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ...runtime.triton import (
    INTERPRETED,
    aligned,
    assembly_for,
    compile_options,
    on_device_of,
    over_blocks,
    pixel_strides,
    two_floats,
)
from ..triton_pixels import (
    add,
    block_of_program,
    combined,
    difference_from,
    gather_codes,
    load_classes,
    load_code,
    load_pixels,
    load_row,
    squared_norm,
    store_pixels,
    subtract,
    zeros_like,
)
from .reference import TRANSFORMS

__all__ = [
    "LaunchSettings",
    "correct",
    "correction_arguments",
    "distance_correction",
    "exponential_of",
    "launch_settings",
    "reciprocal_of",
    "transformed",
]


@triton.jit
def reciprocal_of(d, ASSEMBLY: tl.constexpr):
    # Triton's division guards the range of d, which costs more than the reciprocal itself. Here d = squared distance + eps is a
    # normal number, so the hardware instruction is accurate to 1 ulp.
    if ASSEMBLY == "ptx":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    elif ASSEMBLY == "gcn":
        return tl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [d], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / d


@triton.jit
def _add_unless(y, k, total, a, b, ASSEMBLY: tl.constexpr):
    """Return total + a b, or total where y == k.

    With predicated PTX instructions this costs only the comparison; a select is not compiled to them. AMD's GCN has no predicates.
    """
    if ASSEMBLY == "ptx":
        return tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .f32 t; setp.ne.s32 p, $1, $2; mov.f32 t, $3; @p fma.rn.f32 t, $4, $5, t; mov.f32 $0, t;}",
            "=f,r,r,f,f,f", [y, k, total, a, b], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(y == k, total, total + a * b)


@triton.jit
def _rival(x, code, eps, C: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return r = 1 / (d + eps) and x - mu for one centroid."""
    diff = subtract(x, code, C)
    d = diff[0] * diff[0] + eps
    for c in tl.static_range(1, C):
        d += diff[c] * diff[c]
    return reciprocal_of(d, ASSEMBLY), diff


@triton.jit
def _add_rival(rivals, pull, x, y, code, k, eps, C: tl.constexpr, MAY_BE_OWN: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Add one centroid's r and r^2 (x - mu) to the sums, unless it is the pixel's own class."""
    r, diff = _rival(x, code, eps, C, ASSEMBLY)
    weight = r * r
    out = ()
    if MAY_BE_OWN:
        for c in tl.static_range(C):
            out = out + (_add_unless(y, k, pull[c], weight, diff[c], ASSEMBLY),)
        rivals = _add_unless(y, k, rivals, r, 1.0, ASSEMBLY)
    else:
        for c in tl.static_range(C):
            out = out + (pull[c] + weight * diff[c],)
        rivals += r
    return rivals, out


@triton.jit
def _sum_run(
    x, y, centroid, eps, C: tl.constexpr, RUN: tl.constexpr, MAY_BE_OWN: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """Return the sums over RUN centroids that start at the pointer `centroid`. y counts from that centroid."""
    codes = ()
    for j in tl.static_range(RUN):
        code, codes = load_code(centroid, j, codes, C, ASSEMBLY)
        if j == 0:
            run, diff = _rival(x, code, eps, C, ASSEMBLY)
            if MAY_BE_OWN:
                run = tl.where(y == 0, 0.0, run)
            run_pull = ()
            for c in tl.static_range(C):
                run_pull = run_pull + (run * run * diff[c],)
        else:
            run, run_pull = _add_rival(run, run_pull, x, y, code, j, eps, C, MAY_BE_OWN, ASSEMBLY)
    return run, run_pull


@triton.jit
def _bitwise_or(a, b):
    return a | b


@triton.jit
def _by_reciprocals(
    x, y, centroids, classes, eps, C: tl.constexpr, RUN: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """Return the gradient for neg_log at temperature 1, where p_k is proportional to r_k: one reciprocal per centroid.

    grad = 2 [ (1 - p_y) r_y (x - mu_y) - sum_{k != y} p_k r_k (x - mu_k) ].

    Centroids are summed in runs of RUN before the runs are added, which makes fp32 sums as accurate as pairwise ones. Only a run
    that contains the own class of one of the block's pixels compares classes. Label maps are piecewise constant, so few runs do;
    `own_runs` has one bit per run (modulo 64).
    """
    rivals = tl.zeros_like(x[0])
    pull = zeros_like(x, C)
    whole = classes // RUN * RUN
    own_runs = tl.reduce(tl.where(y >= 0, tl.full(y.shape, 1, tl.int64) << ((y // RUN) & 63), 0), 0, _bitwise_or)
    centroid = centroids
    for first in range(0, whole, RUN):
        if (own_runs >> ((first // RUN) & 63)) & 1:
            run, run_pull = _sum_run(x, y - first, centroid, eps, C, RUN, True, ASSEMBLY)
        else:
            run, run_pull = _sum_run(x, y, centroid, eps, C, RUN, False, ASSEMBLY)
        rivals += run
        pull = add(pull, run_pull, C)
        centroid += RUN * C
    run = tl.zeros_like(x[0])
    run_pull = zeros_like(x, C)
    for k in range(whole, classes):
        run, run_pull = _add_rival(run, run_pull, x, y, load_row(centroid, C, "plain"), k, eps, C, True, ASSEMBLY)
        centroid += C
    rivals += run
    pull = add(pull, run_pull, C)
    # Gathered after the loop: codes that live through the loop would cost C registers per pixel.
    diff = subtract(x, gather_codes(centroids, y, C), C)
    r = reciprocal_of(squared_norm(diff, C) + eps, ASSEMBLY)
    reciprocal_total = reciprocal_of(rivals + r, ASSEMBLY)
    grad = ()
    for c in tl.static_range(C):
        grad = grad + (2.0 * (diff[c] * (r * (rivals * reciprocal_total)) - pull[c] * reciprocal_total),)
    return grad


@triton.jit
def transformed(d, eps, inverse_temperature, TRANSFORM: tl.constexpr):
    """Return the logit T(d) / tau and the slope T'(d). For neg_log the logit uses log2, as `exponential_of` uses exp2."""
    if TRANSFORM == 0:
        return -tl.log2(d + eps) * inverse_temperature, -1.0 / (d + eps)
    elif TRANSFORM == 1:
        return -d * inverse_temperature, tl.zeros_like(d) - 1.0
    elif TRANSFORM == 2:
        root = tl.sqrt(d + eps)
        return -root * inverse_temperature, -0.5 / root
    else:
        tl.static_assert(TRANSFORM == 3)
        # Logits reach 1 / eps, and the exponential amplifies each ulp, so the quotient must be correctly rounded. In fp64 it is.
        if d.dtype == tl.float32:
            r = tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d + eps)
        else:
            r = 1.0 / (d + eps)
        return r * inverse_temperature, -r * r


@triton.jit
def exponential_of(logit, TRANSFORM: tl.constexpr):
    """Undo `transformed`'s logarithm. The hardware exponential has base 2; base e costs one more rounding of the argument."""
    if TRANSFORM == 0:
        return tl.exp2(logit)
    else:
        return tl.exp(logit)


@triton.jit
def _by_softmax(
    x, y, centroids, classes, eps, inverse_temperature, C: tl.constexpr, RUN: tl.constexpr, TRANSFORM: tl.constexpr
):  # fmt: skip
    """Return the gradient for any transform, temperature and magnitude.

    T decreases with d, so the largest logit belongs to the smallest distance.
    grad = (2 / tau) sum_{k != y} p_k [T'(d_k) (x - mu_k) - T'(d_y) (x - mu_y)], with the difference taken per class.
    """
    smallest = tl.full(x[0].shape, float("inf"), x[0].dtype)
    for k in range(0, classes):
        d = squared_norm(difference_from(x, centroids + k * C, C), C)
        smallest = tl.where(d < smallest, d, smallest)
    largest, _ = transformed(smallest, eps, inverse_temperature, TRANSFORM)
    diff = subtract(x, gather_codes(centroids, y, C), C)
    own_logit, own_slope = transformed(squared_norm(diff, C), eps, inverse_temperature, TRANSFORM)
    own_term = ()
    for c in tl.static_range(C):
        own_term = own_term + (own_slope * diff[c],)
    total = exponential_of(own_logit - largest, TRANSFORM)
    push = zeros_like(x, C)
    for first in range(0, classes, RUN):
        run = tl.zeros_like(x[0])
        run_push = zeros_like(x, C)
        for k in range(first, min(first + RUN, classes)):
            diff = difference_from(x, centroids + k * C, C)
            logit, slope = transformed(squared_norm(diff, C), eps, inverse_temperature, TRANSFORM)
            e = tl.where(y == k, 0.0, exponential_of(logit - largest, TRANSFORM))
            run += e
            new = ()
            for c in tl.static_range(C):
                new = new + (run_push[c] + e * (slope * diff[c] - own_term[c]),)
            run_push = new
        total += run
        push = add(push, run_push, C)
    # If a distance is NaN or overflows, the result must be NaN and not a plausible number.
    nan_or_zero = smallest * 0.0 + squared_norm(x, C) * 0.0
    grad = ()
    for c in tl.static_range(C):
        grad = grad + (2.0 * inverse_temperature * (push[c] / total) + nan_or_zero,)
    return grad


@triton.jit
def _is_moderate(x, centroids, classes, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return True if no pixel of the block is far outside the codes and eps is not tiny.

    Only then is `_by_reciprocals` as exact as `_by_softmax`, with squares within the range of fp32. NaN gives False.
    """
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], x[0].dtype)
    for start in range(0, classes * C, BLOCK):
        largest = tl.maximum(largest, tl.abs(tl.load(centroids + start + i, mask=start + i < classes * C, other=0.0)))
    largest = tl.max(largest, 0)
    near = tl.abs(x[0]) <= 8 * largest
    for c in tl.static_range(1, C):
        near = near & (tl.abs(x[c]) <= 8 * largest)
    far = tl.max((~near).to(tl.int32), 0)
    return (far == 0) & (largest < 1e4) & (eps >= 1e-12) & (eps >= 1e-12 * largest * largest)


@triton.jit
def correct(
    x, y, centroids, classes, eps, inverse_temperature, max_norm,
    C: tl.constexpr, TRANSFORM: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, CAPPED: tl.constexpr,
    ASSEMBLY: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return grad Phi of a block with pixels x and own classes y. Where y is -1 the caller must set it to 0."""
    if TRANSFORM == 0 and UNIT_TEMPERATURE:
        if _is_moderate(x, centroids, classes, eps, C, BLOCK):
            grad = _by_reciprocals(x, y, centroids, classes, eps, C, RUN, ASSEMBLY)
        else:
            grad = _by_softmax(x, y, centroids, classes, eps, inverse_temperature, C, RUN, TRANSFORM)
    else:
        grad = _by_softmax(x, y, centroids, classes, eps, inverse_temperature, C, RUN, TRANSFORM)
    if CAPPED:
        norm = tl.sqrt(squared_norm(grad, C))
        factor = tl.where(norm > max_norm, max_norm / norm, 1.0)
        capped = ()
        for c in tl.static_range(C):
            capped = capped + (grad[c] * factor,)
        return capped
    else:
        return grad


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "l_b", "l_h", "l_w", "width", "pixels", "blocks", "classes", "ignore_index",
        "eps", "eps_low", "inverse_temperature", "inverse_temperature_low", "max_norm", "max_norm_low",
    ]
)  # fmt: skip
def _distance_correction(
    x,  # (B, C, H, W)
    labels,  # (B, H, W)
    centroids,  # (K, C)
    out,  # (B, C, H, W), contiguous
    # strides of x and of labels
    x_b, x_c, x_h, x_w, l_b, l_h, l_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, classes, ignore_index,
    # numbers, each as the sum of two fp32 numbers
    eps, eps_low, inverse_temperature, inverse_temperature_low, max_norm, max_norm_low,
    X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    C: tl.constexpr, TRANSFORM: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, CAPPED: tl.constexpr,
    ASSEMBLY: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    y = load_classes(labels, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    grad = correct(
        point, y, centroids, classes,
        combined(eps, eps_low, acc),
        combined(inverse_temperature, inverse_temperature_low, acc),
        combined(max_norm, max_norm_low, acc),
        C, TRANSFORM, UNIT_TEMPERATURE, CAPPED, ASSEMBLY, RUN, BLOCK,
    )  # fmt: skip
    kept = ()
    for c in tl.static_range(C):
        kept = kept + (tl.where(y >= 0, grad[c], 0.0),)
    store_pixels(out, kept, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)


@dataclasses.dataclass(frozen=True)
class LaunchSettings:
    """block: pixels per program; run: centroids per partial sum; options: compiler options."""

    block: int
    run: int
    options: dict[str, object]


def launch_settings(channels: int, dtype: torch.dtype, interpreted: bool, registers: int = 168) -> LaunchSettings:
    """Return launch settings: a fixed rule, no tuning.

    The pixels of a thread share each centroid it loads, and their sums must fit in registers. Programs have only two warps, so a
    multiprocessor runs as many programs as its registers allow: six at 168 registers per thread.
    """
    if interpreted:
        return LaunchSettings(4096, 16, compile_options(1))
    if dtype == torch.float64:
        return LaunchSettings(64, 8, compile_options(2))
    pixels_per_thread = 4 if channels <= 3 else 2 if channels <= 8 else 1
    return LaunchSettings(64 * pixels_per_thread, 16 if channels <= 8 else 4, compile_options(2, registers))


def correction_arguments(
    temperature: float, eps: float, transform: str, max_norm: float | None
) -> tuple[tuple[float, ...], dict[str, object]]:
    """Return the correction's numbers, each as two fp32 numbers, and the kernels' constants that follow from its options."""
    floats = (*two_floats(eps), *two_floats(1 / temperature), *two_floats(0.0 if max_norm is None else max_norm))
    constants = {
        "TRANSFORM": TRANSFORMS.index(transform),
        "UNIT_TEMPERATURE": temperature == 1,
        "CAPPED": max_norm is not None,
    }
    return floats, constants


def distance_correction(
    xhat: torch.Tensor,
    labels: torch.Tensor,
    centroids: torch.Tensor,
    temperature: float,
    eps: float,
    transform: str,
    max_norm: float | None,
    ignore_index: int,
) -> torch.Tensor:
    """Return grad Phi (B, C, H, W), as reference.distance_correction. Labels out of range count as ignored."""
    out = torch.empty(xhat.shape, dtype=xhat.dtype, device=xhat.device)
    if out.numel() == 0:
        return out
    channels = xhat.shape[1]
    settings = launch_settings(channels, centroids.dtype, INTERPRETED)
    programs, sizes, layouts = over_blocks(settings.block, X=xhat, L=labels)
    floats, constants = correction_arguments(temperature, eps, transform, max_norm)
    with on_device_of(xhat):
        _distance_correction[programs](
            xhat, labels, aligned(centroids), out, *sizes, centroids.shape[0], ignore_index, *floats,
            **layouts, OUT_LAYOUT=pixel_strides(out)[1], C=channels,
            ASSEMBLY=assembly_for(centroids.dtype), RUN=settings.run, BLOCK=settings.block,
            **constants, **settings.options,
        )  # fmt: skip
    return out
