"""Triton kernels of the distance-aware correction. Formulas and their order are those of csrc/include/flowseg/correction.h.

A program takes one block of pixels of one image and walks through the centroids, which every thread reads from the cache; its
state is C + 1 sums a pixel, so no array over K ever exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...runtime.triton_forms import (
    INTERPRETED,
    VECTOR,
    Variant,
    aligned,
    compile_options,
    on_device_of,
    pixel_strides,
    reciprocal_form,
    two_floats,
    variant,
)
from ..triton_pixels import (
    add,
    difference_from,
    gather_codes,
    load_classes,
    load_pixels,
    squared_norm,
    store_pixels,
    subtract,
    wide,
    zeros_like,
)
from .reference import TRANSFORMS

__all__ = ["Launch", "correct", "correction_arguments", "distance_correction", "launch", "variants"]


@triton.jit
def _reciprocal(d, FORM: tl.constexpr):
    # The plain quotient of Triton guards the range of d, which costs more than the reciprocal itself. d = squared distance + eps
    # is a normal number here, so the machine's own instruction is right to 1 ulp.
    if FORM == "ptx":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    elif FORM == "gcn":
        return tl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [d], dtype=tl.float32, is_pure=True, pack=1)
    elif FORM == "off_by_one":
        bits = (1.0 / d).to(tl.int32, bitcast=True)
        return (bits + d.to(tl.int32, bitcast=True) % 3 - 1).to(tl.float32, bitcast=True)
    else:
        return 1.0 / d


@triton.jit
def _add_rival(rivals, pull, x, y, centroid, k, eps, C: tl.constexpr, MAY_BE_OWN: tl.constexpr, FORM: tl.constexpr):
    """Add one centroid's r = 1 / (d + eps) and r^2 (x - mu) to the sums, unless it is the pixel's own."""
    diff = difference_from(x, centroid, C)
    d = diff[0] * diff[0] + eps
    for c in tl.static_range(1, C):
        d += diff[c] * diff[c]
    r = _reciprocal(d, FORM)
    if MAY_BE_OWN:
        r = tl.where(y == k, 0.0, r)
    weight = r * r
    out = ()
    for c in tl.static_range(C):
        out = out + (pull[c] + weight * diff[c],)
    return rivals + r, out


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _by_reciprocals(
    x, y, centroids, classes, eps, C: tl.constexpr, RUN: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """neg_log at temperature 1: p_k is proportional to r_k, one reciprocal a centroid.

    grad = 2 [ (1 - p_y) r_y (x - mu_y) - sum_{k != y} p_k r_k (x - mu_k) ]. Each run is summed by itself first, which keeps fp32
    sums as accurate as pairwise ones. Only runs that hold the class of one of the block's pixels look for it: label maps are
    piecewise constant, so those are few. A word with one bit a run (modulo 64) says which.
    """
    rivals = tl.zeros_like(x[0])
    pull = zeros_like(x, C)
    whole = classes // RUN * RUN
    held = tl.reduce(tl.where(y >= 0, tl.full(y.shape, 1, tl.int64) << ((y // RUN) & 63), 0), 0, _either)
    centroid = centroids
    for first in range(0, whole, RUN):
        run = tl.zeros_like(x[0])
        run_pull = zeros_like(x, C)
        if (held >> ((first // RUN) & 63)) & 1:
            for j in tl.static_range(RUN):
                run, run_pull = _add_rival(run, run_pull, x, y, centroid + j * C, first + j, eps, C, True, FORM)
        else:
            for j in tl.static_range(RUN):
                run, run_pull = _add_rival(run, run_pull, x, y, centroid + j * C, first + j, eps, C, False, FORM)
        rivals += run
        pull = add(pull, run_pull, C)
        centroid += RUN * C
    run = tl.zeros_like(x[0])
    run_pull = zeros_like(x, C)
    for k in range(whole, classes):
        run, run_pull = _add_rival(run, run_pull, x, y, centroid, k, eps, C, True, FORM)
        centroid += C
    rivals += run
    pull = add(pull, run_pull, C)
    # Gathered only now: held through the loop the codes would cost C registers a pixel.
    diff = subtract(x, gather_codes(centroids, y, C), C)
    r = 1.0 / (squared_norm(diff, C) + eps)
    share = 1.0 / (rivals + r)
    grad = ()
    for c in tl.static_range(C):
        grad = grad + (2.0 * (diff[c] * (r * (rivals * share)) - pull[c] * share),)
    return grad


@triton.jit
def _transform(d, eps, inverse_temperature, KIND: tl.constexpr):
    """Logit T(d) / tau and slope T'(d)."""
    if KIND == 0:
        return -tl.log(d + eps) * inverse_temperature, -1.0 / (d + eps)
    elif KIND == 1:
        return -d * inverse_temperature, tl.zeros_like(d) - 1.0
    elif KIND == 2:
        root = tl.sqrt(d + eps)
        return -root * inverse_temperature, -0.5 / root
    else:
        r = 1.0 / (d + eps)
        return r * inverse_temperature, -r * r


@triton.jit
def _by_softmax(
    x, y, centroids, classes, eps, inverse_temperature, C: tl.constexpr, RUN: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Any transform and temperature, any magnitude: T decreases in d, so the largest logit is that of the smallest distance.

    grad = (2 / tau) sum_{k != y} p_k [T'(d_k) (x - mu_k) - T'(d_y) (x - mu_y)], the difference taken class by class.
    """
    smallest = tl.full(x[0].shape, float("inf"), x[0].dtype)
    for k in range(0, classes):
        d = squared_norm(difference_from(x, centroids + k * C, C), C)
        smallest = tl.where(d < smallest, d, smallest)
    largest, _ = _transform(smallest, eps, inverse_temperature, KIND)
    diff = subtract(x, gather_codes(centroids, y, C), C)
    own_logit, own_slope = _transform(squared_norm(diff, C), eps, inverse_temperature, KIND)
    home = ()
    for c in tl.static_range(C):
        home = home + (own_slope * diff[c],)
    total = tl.exp(own_logit - largest)
    push = zeros_like(x, C)
    for first in range(0, classes, RUN):
        run = tl.zeros_like(x[0])
        run_push = zeros_like(x, C)
        for k in range(first, min(first + RUN, classes)):
            diff = difference_from(x, centroids + k * C, C)
            logit, slope = _transform(squared_norm(diff, C), eps, inverse_temperature, KIND)
            e = tl.where(y == k, 0.0, tl.exp(logit - largest))
            run += e
            new = ()
            for c in tl.static_range(C):
                new = new + (run_push[c] + e * (slope * diff[c] - home[c]),)
            run_push = new
        total += run
        push = add(push, run_push, C)
    # A distance that is not finite (NaN or overflow) makes the result NaN instead of something that looks right.
    poison = smallest * 0.0 + squared_norm(x, C) * 0.0
    grad = ()
    for c in tl.static_range(C):
        grad = grad + (2.0 * inverse_temperature * (push[c] / total) + poison,)
    return grad


@triton.jit
def _is_moderate(x, centroids, classes, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """True when no point of the block is far out compared with the codes and eps is not tiny: only then is the form by
    reciprocals as exact as the general one, and its squares inside the range of fp32. False for NaN too."""
    i = tl.arange(0, BLOCK)
    reach = tl.zeros([BLOCK], x[0].dtype)
    for start in range(0, classes * C, BLOCK):
        reach = tl.maximum(reach, tl.abs(tl.load(centroids + start + i, mask=start + i < classes * C, other=0.0)))
    reach = tl.max(reach, 0)
    near = tl.abs(x[0]) <= 8 * reach
    for c in tl.static_range(1, C):
        near = near & (tl.abs(x[c]) <= 8 * reach)
    far = tl.max((~near).to(tl.int32), 0)
    return (far == 0) & (reach < 1e4) & (eps >= 1e-12) & (eps >= 1e-12 * reach * reach)


@triton.jit
def correct(
    x, y, centroids, classes, eps, inverse_temperature, max_norm,
    C: tl.constexpr, KIND: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, CAPPED: tl.constexpr,
    FORM: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad Phi of a block at x with classes y; not yet 0 where y is -1."""
    if KIND == 0 and UNIT_TEMPERATURE:
        if _is_moderate(x, centroids, classes, eps, C, BLOCK):
            grad = _by_reciprocals(x, y, centroids, classes, eps, C, RUN, FORM)
        else:
            grad = _by_softmax(x, y, centroids, classes, eps, inverse_temperature, C, RUN, KIND)
    else:
        grad = _by_softmax(x, y, centroids, classes, eps, inverse_temperature, C, RUN, KIND)
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
    x, labels, centroids, out,
    x_b, x_c, x_h, x_w, l_b, l_h, l_w, width, pixels, blocks, classes, ignore_index,
    eps, eps_low, inverse_temperature, inverse_temperature_low, max_norm, max_norm_low,
    X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    C: tl.constexpr, KIND: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, CAPPED: tl.constexpr,
    FORM: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    inside = start + tl.arange(0, BLOCK) < pixels
    acc: tl.constexpr = centroids.dtype.element_ty
    point = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    y = load_classes(labels, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    grad = correct(
        point, y, centroids, classes,
        wide(eps, eps_low, acc), wide(inverse_temperature, inverse_temperature_low, acc), wide(max_norm, max_norm_low, acc),
        C, KIND, UNIT_TEMPERATURE, CAPPED, FORM, RUN, BLOCK,
    )  # fmt: skip
    kept = ()
    for c in tl.static_range(C):
        kept = kept + (tl.where(y >= 0, grad[c], 0.0),)
    store_pixels(out, kept, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Pixels a program, centroids a run, and the options of the compiler."""

    block: int
    run: int
    options: dict[str, object]


def launch(channels: int, dtype: torch.dtype, interpreted: bool, registers: int = 168) -> Launch:
    """Settings by rule: the pixels a thread holds share each centroid they read, and their sums must fit in registers.

    Programs are small, two warps, so that as many fit on a multiprocessor as the registers allow: six at 168.
    """
    if interpreted:
        return Launch(4096, 8, compile_options(1))
    if dtype == torch.float64:
        return Launch(64, 8, compile_options(2))
    pixels_a_thread = 4 if channels <= 3 else 2 if channels <= 8 else 1
    return Launch(64 * pixels_a_thread, 8 if channels <= 8 else 4, compile_options(2, registers))


def correction_arguments(
    temperature: float, eps: float, transform: str, max_norm: float | None
) -> tuple[tuple[float, ...], dict[str, object]]:
    """The floats of the correction as the kernels take them, and the constants that follow from its options."""
    floats = (*two_floats(eps), *two_floats(1 / temperature), *two_floats(0.0 if max_norm is None else max_norm))
    constants = {
        "KIND": TRANSFORMS.index(transform),
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
    """grad Phi, as the reference gives it. Labels out of range count as ignored."""
    out = torch.empty(xhat.shape, dtype=xhat.dtype, device=xhat.device)
    if out.numel() == 0:
        return out
    batch, channels, height, width = xhat.shape
    x_strides, x_layout = pixel_strides(xhat)
    l_strides, l_layout = pixel_strides(labels)
    how = launch(channels, centroids.dtype, INTERPRETED)
    blocks = triton.cdiv(height * width, how.block)
    floats, constants = correction_arguments(temperature, eps, transform, max_norm)
    with on_device_of(xhat):
        _distance_correction[(batch * blocks,)](
            xhat, labels, aligned(centroids), out,
            *x_strides, *l_strides, width, height * width, blocks, centroids.shape[0], ignore_index, *floats,
            X_LAYOUT=x_layout, L_LAYOUT=l_layout, OUT_LAYOUT=pixel_strides(out)[1],
            C=channels, FORM=reciprocal_form(centroids.dtype), RUN=how.run, BLOCK=how.block,
            **constants, **how.options,
        )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    """The forms that users meet most, and every number of channels that the launch rule treats apart."""
    for channels, kind, dtype in (
        *((c, 0, "bf16") for c in (1, 3, 4, 8, 16)), *((3, kind, "fp32") for kind in range(4)), (3, 0, "fp64"),
    ):  # fmt: skip
        acc = "fp64" if dtype == "fp64" else "fp32"
        how = launch(channels, torch.float64 if acc == "fp64" else torch.float32, interpreted=False)
        yield variant(
            f"distance_correction C={channels} {TRANSFORMS[kind]} {dtype}",
            _distance_correction,
            {"x": dtype, "labels": "u8", "centroids": acc, "out": dtype},
            {
                "X_LAYOUT": VECTOR, "L_LAYOUT": VECTOR, "OUT_LAYOUT": VECTOR, "C": channels, "KIND": kind,
                "UNIT_TEMPERATURE": True, "CAPPED": False, "FORM": "ptx" if acc == "fp32" else "divide",
                "RUN": how.run, "BLOCK": how.block,
            },
            how.options,
        )  # fmt: skip
