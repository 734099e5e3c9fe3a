"""Triton kernels of the distance-aware correction. Formulas and their order are those of csrc/shared/correction.h.

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
    machine_form,
    on_device_of,
    over_blocks,
    pixel_strides,
    two_floats,
    variant,
)
from ..triton_pixels import (
    add,
    block_of_program,
    difference_from,
    gather_codes,
    load_classes,
    load_code,
    load_pixels,
    load_row,
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
    else:
        return 1.0 / d


@triton.jit
def _add_unless(y, k, total, a, b, FORM: tl.constexpr):
    """total + a b, or total where y == k. As predicated instructions, which a select is not compiled to, that costs nothing but
    the comparison. The language of AMD's machines has no predicates."""
    if FORM == "ptx":
        return tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .f32 t; setp.ne.s32 p, $1, $2; mov.f32 t, $3; @p fma.rn.f32 t, $4, $5, t; mov.f32 $0, t;}",
            "=f,r,r,f,f,f", [y, k, total, a, b], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(y == k, total, total + a * b)


@triton.jit
def _rival(x, code, eps, C: tl.constexpr, FORM: tl.constexpr):
    """r = 1 / (d + eps) and x - mu of one centroid."""
    diff = subtract(x, code, C)
    d = diff[0] * diff[0] + eps
    for c in tl.static_range(1, C):
        d += diff[c] * diff[c]
    return _reciprocal(d, FORM), diff


@triton.jit
def _add_rival(rivals, pull, x, y, code, k, eps, C: tl.constexpr, MAY_BE_OWN: tl.constexpr, FORM: tl.constexpr):
    """Add one centroid's r and r^2 (x - mu) to the sums, unless it is the pixel's own."""
    r, diff = _rival(x, code, eps, C, FORM)
    weight = r * r
    out = ()
    if MAY_BE_OWN:
        for c in tl.static_range(C):
            out = out + (_add_unless(y, k, pull[c], weight, diff[c], FORM),)
        rivals = _add_unless(y, k, rivals, r, 1.0, FORM)
    else:
        for c in tl.static_range(C):
            out = out + (pull[c] + weight * diff[c],)
        rivals += r
    return rivals, out


@triton.jit
def _sum_run(
    x, y, centroid, eps, C: tl.constexpr, RUN: tl.constexpr, MAY_BE_OWN: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """The sums of RUN centroids from the pointer `centroid` on; y counts from there."""
    codes = ()
    for j in tl.static_range(RUN):
        code, codes = load_code(centroid, j, codes, C, FORM)
        if j == 0:
            run, diff = _rival(x, code, eps, C, FORM)
            if MAY_BE_OWN:
                run = tl.where(y == 0, 0.0, run)
            run_pull = ()
            for c in tl.static_range(C):
                run_pull = run_pull + (run * run * diff[c],)
        else:
            run, run_pull = _add_rival(run, run_pull, x, y, code, j, eps, C, MAY_BE_OWN, FORM)
    return run, run_pull


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
        if (held >> ((first // RUN) & 63)) & 1:
            run, run_pull = _sum_run(x, y - first, centroid, eps, C, RUN, True, FORM)
        else:
            run, run_pull = _sum_run(x, y, centroid, eps, C, RUN, False, FORM)
        rivals += run
        pull = add(pull, run_pull, C)
        centroid += RUN * C
    run = tl.zeros_like(x[0])
    run_pull = zeros_like(x, C)
    for k in range(whole, classes):
        run, run_pull = _add_rival(run, run_pull, x, y, load_row(centroid, C, "plain"), k, eps, C, True, FORM)
        centroid += C
    rivals += run
    pull = add(pull, run_pull, C)
    # Gathered only now: held through the loop the codes would cost C registers a pixel.
    diff = subtract(x, gather_codes(centroids, y, C), C)
    r = _reciprocal(squared_norm(diff, C) + eps, FORM)
    share = _reciprocal(rivals + r, FORM)
    grad = ()
    for c in tl.static_range(C):
        grad = grad + (2.0 * (diff[c] * (r * (rivals * share)) - pull[c] * share),)
    return grad


@triton.jit
def _transform(d, eps, inverse_temperature, KIND: tl.constexpr):
    """Logit T(d) / tau, for neg_log in units of log 2, and slope T'(d)."""
    if KIND == 0:
        return -tl.log2(d + eps) * inverse_temperature, -1.0 / (d + eps)
    elif KIND == 1:
        return -d * inverse_temperature, tl.zeros_like(d) - 1.0
    elif KIND == 2:
        root = tl.sqrt(d + eps)
        return -root * inverse_temperature, -0.5 / root
    else:
        # Logits as large as 1 / eps, whose exponential shows each ulp: a correctly rounded quotient, which fp64's always is.
        if d.dtype == tl.float32:
            r = tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d + eps)
        else:
            r = 1.0 / (d + eps)
        return r * inverse_temperature, -r * r


@triton.jit
def _exponential(logit, KIND: tl.constexpr):
    """The machine's is of base 2: one of base e rounds its argument once more."""
    if KIND == 0:
        return tl.exp2(logit)
    else:
        return tl.exp(logit)


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
    total = _exponential(own_logit - largest, KIND)
    push = zeros_like(x, C)
    for first in range(0, classes, RUN):
        run = tl.zeros_like(x[0])
        run_push = zeros_like(x, C)
        for k in range(first, min(first + RUN, classes)):
            diff = difference_from(x, centroids + k * C, C)
            logit, slope = _transform(squared_norm(diff, C), eps, inverse_temperature, KIND)
            e = tl.where(y == k, 0.0, _exponential(logit - largest, KIND))
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
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
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
        return Launch(4096, 16, compile_options(1))
    if dtype == torch.float64:
        return Launch(64, 8, compile_options(2))
    pixels_a_thread = 4 if channels <= 3 else 2 if channels <= 8 else 1
    return Launch(64 * pixels_a_thread, 16 if channels <= 8 else 4, compile_options(2, registers))


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
    channels = xhat.shape[1]
    how = launch(channels, centroids.dtype, INTERPRETED)
    grid, sizes, layouts = over_blocks(how.block, X=xhat, L=labels)
    floats, constants = correction_arguments(temperature, eps, transform, max_norm)
    with on_device_of(xhat):
        _distance_correction[grid](
            xhat, labels, aligned(centroids), out, *sizes, centroids.shape[0], ignore_index, *floats,
            **layouts, OUT_LAYOUT=pixel_strides(out)[1], C=channels,
            FORM=machine_form(centroids.dtype), RUN=how.run, BLOCK=how.block,
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
                "UNIT_TEMPERATURE": True, "CAPPED": False, "FORM": "ptx" if acc == "fp32" else "plain",
                "RUN": how.run, "BLOCK": how.block,
            },
            how.options,
        )  # fmt: skip
