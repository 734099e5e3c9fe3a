"""Triton kernels of flow_loss: loss and residual in one pass over the pixels, and the backward that scales the residual.

The sums take two stages, a fixed share for each program and then a fixed order over the programs: the same bits in every run.
"""

from __future__ import annotations

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
from ..distance_correction.triton_kernels import correct, correction_arguments, launch
from ..flow_interpolate.triton_kernels import block_of
from ..shared.formulas import compute_dtype
from ..triton_pixels import (
    block_of_program,
    gather_codes,
    load_classes,
    load_pixels,
    pixel_offsets,
    store_pixels,
    subtract,
    wide,
)

__all__ = ["flow_loss", "flow_loss_bwd", "variants"]


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "s_b", "s_c", "s_h", "s_w", "l_b", "l_h", "l_w", "t_b", "width", "pixels", "blocks",
        "classes", "ignore_index", "eps", "eps_low", "inverse_temperature", "inverse_temperature_low", "max_norm",
        "max_norm_low", "weight", "weight_low", "t_min", "t_min_low",
    ]
)  # fmt: skip
def _flow_loss(
    x, source, labels, t, centroids, residual, per_pixel, sums, counts,
    x_b, x_c, x_h, x_w, s_b, s_c, s_h, s_w, l_b, l_h, l_w, width, pixels, blocks, t_b, classes, ignore_index,
    eps, eps_low, inverse_temperature, inverse_temperature_low, max_norm, max_norm_low,
    weight, weight_low, t_min, t_min_low,
    X_LAYOUT: tl.constexpr, S_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    C: tl.constexpr, ENDPOINT: tl.constexpr, ENDPOINT_SPACE: tl.constexpr, CORRECTED: tl.constexpr, ANNEALED: tl.constexpr,
    NEED_GRAD: tl.constexpr, EACH: tl.constexpr,
    KIND: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, CAPPED: tl.constexpr,
    FORM: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    y = load_classes(labels, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    time = tl.load(t + image * t_b).to(acc)
    rest = 1.0 - time
    scale = rest * 0.0 + 1.0
    if ENDPOINT and not ENDPOINT_SPACE:
        scale = 1.0 / tl.maximum(rest, wide(t_min, t_min_low, acc))
    elif ENDPOINT_SPACE and not ENDPOINT:
        scale = rest
    if CORRECTED:
        xhat = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
        if not ENDPOINT:
            x0 = load_pixels(source, image, s_b, s_c, s_h, s_w, start, width, inside, S_LAYOUT, C, acc, BLOCK)
            code = gather_codes(centroids, y, C)
            moved = ()
            for c in tl.static_range(C):
                moved = moved + (rest * (x0[c] + xhat[c]) + time * code[c],)
            xhat = moved
        grad = correct(
            xhat, y, centroids, classes,
            wide(eps, eps_low, acc), wide(inverse_temperature, inverse_temperature_low, acc), wide(max_norm, max_norm_low, acc),
            C, KIND, UNIT_TEMPERATURE, CAPPED, FORM, RUN, BLOCK,
        )  # fmt: skip
    # Read after the correction, from the cache: held through its loop they would cost 3 C registers a pixel.
    out = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    target = gather_codes(centroids, y, C)
    if not ENDPOINT:
        x0 = load_pixels(source, image, s_b, s_c, s_h, s_w, start, width, inside, S_LAYOUT, C, acc, BLOCK)
        target = subtract(target, x0, C)
    error = ()
    for c in tl.static_range(C):
        error = error + (scale * (out[c] - target[c]),)
    if CORRECTED:
        by = wide(weight, weight_low, acc)
        if ANNEALED:
            by = by * rest
        reshaped = ()
        for c in tl.static_range(C):
            reshaped = reshaped + (error[c] + by * grad[c],)
        error = reshaped
    back = scale * 2.0 / C
    square = tl.zeros_like(error[0])
    kept = ()
    for c in tl.static_range(C):
        e = tl.where(y >= 0, error[c], 0.0)
        square += e * e
        kept = kept + (e * back,)
    square = square / C
    if NEED_GRAD:
        store_pixels(residual, kept, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)
    if EACH:
        tl.store(per_pixel + image * pixels + start + tl.arange(0, BLOCK), square, mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(square.to(tl.float64), 0))
    tl.store(counts + tl.program_id(0), tl.sum((y >= 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["programs"])
def _finish(sums, counts, loss, count, programs, MEAN: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """The second stage: one program adds the shares of all others in their order."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    valid = tl.zeros([BLOCK], tl.int64)
    for start in range(0, programs, BLOCK):
        total += tl.load(sums + start + i, mask=start + i < programs, other=0.0)
        valid += tl.load(counts + start + i, mask=start + i < programs, other=0)
    number = tl.sum(valid, 0)
    tl.store(count, number)
    if not EACH:
        value = tl.sum(total, 0)
        if MEAN:
            value = value / tl.maximum(number, 1).to(tl.float64)
        tl.store(loss, value.to(loss.dtype.element_ty))


@triton.jit(
    do_not_specialize=["r_b", "r_c", "r_h", "r_w", "g_b", "g_h", "g_w", "width", "pixels", "blocks"],
)
def _scale(
    grad_loss, residual, count, out, r_b, r_c, r_h, r_w, g_b, g_h, g_w, width, pixels, blocks,
    R_LAYOUT: tl.constexpr, G_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, C: tl.constexpr, MEAN: tl.constexpr,
    EACH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, start, inside = block_of_program(pixels, blocks, R_LAYOUT, BLOCK)
    r = load_pixels(residual, image, r_b, r_c, r_h, r_w, start, width, inside, R_LAYOUT, C, ACC, BLOCK)
    if EACH:
        at = image * g_b + pixel_offsets(start, g_h, g_w, width, G_LAYOUT, BLOCK)
        factor = tl.load(grad_loss + at, mask=inside, other=0.0).to(ACC)
    else:
        factor = tl.zeros([BLOCK], ACC) + tl.load(grad_loss).to(ACC)
        if MEAN:
            factor = factor / tl.maximum(tl.load(count), 1).to(ACC)
    scaled = ()
    for c in tl.static_range(C):
        scaled = scaled + (r[c] * factor,)
    store_pixels(out, scaled, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)


def _registers(channels: int) -> int:
    """The most a thread may use: five programs of two warps fit on a multiprocessor with either."""
    return 176 if channels <= 8 else 200


def flow_loss(
    prediction: torch.Tensor,
    source: torch.Tensor,
    labels: torch.Tensor,
    t: torch.Tensor,
    centroids: torch.Tensor,
    predicts: str,
    loss_space: str,
    correction_weight: float,
    schedule: str,
    temperature: float,
    eps: float,
    transform: str,
    max_norm: float | None,
    ignore_index: int,
    reduction: str,
    t_min: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, residual and count, as the reference gives them. Labels out of range count as ignored."""
    channels = prediction.shape[1]
    device = prediction.device
    each = reduction == "none"
    residual = torch.empty(prediction.shape if need_grad else (0,), dtype=prediction.dtype, device=device)
    loss = torch.empty(labels.shape if each else (), dtype=compute_dtype(prediction.dtype), device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    how = launch(channels, centroids.dtype, INTERPRETED, _registers(channels))
    (programs,), sizes, layouts = over_blocks(how.block, X=prediction, S=source, L=labels)
    sums = torch.empty(programs, dtype=torch.float64, device=device)
    counts = torch.empty(programs, dtype=torch.int32, device=device)
    floats, constants = correction_arguments(temperature, eps, transform, max_norm)
    with on_device_of(prediction):
        if programs:
            _flow_loss[(programs,)](
                prediction, source, labels, t, aligned(centroids), residual, loss, sums, counts,
                *sizes, t.stride(0), centroids.shape[0],
                ignore_index, *floats, *two_floats(correction_weight), *two_floats(t_min),
                **layouts, OUT_LAYOUT=pixel_strides(residual)[1] if need_grad else 0,
                C=channels, ENDPOINT=predicts == "endpoint", ENDPOINT_SPACE=loss_space == "endpoint",
                CORRECTED=correction_weight != 0, ANNEALED=schedule == "annealed", NEED_GRAD=need_grad, EACH=each,
                FORM=machine_form(centroids.dtype), RUN=how.run, BLOCK=how.block, **constants, **how.options,
            )  # fmt: skip
        _finish[(1,)](
            sums, counts, loss, count, programs, MEAN=reduction == "mean", EACH=each, BLOCK=1024, **compile_options(4)
        )
    return loss, residual, count


def flow_loss_bwd(
    grad_loss: torch.Tensor, residual: torch.Tensor, count: torch.Tensor, prediction: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Gradient of the prediction, in its dtype: the saved residual times the gradient of the loss."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out.numel() == 0:
        return out
    channels = residual.shape[1]
    each = reduction == "none"
    block = block_of(channels)
    # One number for all pixels stands for a map of them.
    grid, sizes, layouts = over_blocks(
        block, R=residual, G=grad_loss if each else grad_loss.expand(residual[:, 0].shape)
    )
    with on_device_of(residual):
        _scale[grid](
            grad_loss, residual, count, out, *sizes,
            **layouts, OUT_LAYOUT=pixel_strides(out)[1], C=channels, MEAN=reduction == "mean", EACH=each,
            ACC=tl.float64 if residual.dtype == torch.float64 else tl.float32, BLOCK=block, **compile_options(4),
        )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    layouts = {name: VECTOR for name in ("X_LAYOUT", "S_LAYOUT", "L_LAYOUT", "OUT_LAYOUT")}
    for channels, kind, endpoint, dtype in (
        (3, 0, False, "bf16"), (3, 0, True, "bf16"), (3, 0, True, "fp32"), (3, 1, False, "fp32"), (8, 0, True, "bf16"),
        (16, 0, False, "bf16"), (3, 0, False, "fp64"),
    ):  # fmt: skip
        acc = "fp64" if dtype == "fp64" else "fp32"
        how = launch(channels, torch.float64 if acc == "fp64" else torch.float32, False, _registers(channels))
        pointers = {
            "x": dtype, "source": dtype, "labels": "u8", "t": "fp32", "centroids": acc, "residual": dtype,
            "per_pixel": acc, "sums": "fp64", "counts": "i32",
        }  # fmt: skip
        constants = {
            **layouts, "C": channels, "ENDPOINT": endpoint, "ENDPOINT_SPACE": endpoint, "CORRECTED": True, "ANNEALED": False,
            "NEED_GRAD": True, "EACH": False, "KIND": kind, "UNIT_TEMPERATURE": True, "CAPPED": False,
            "FORM": "ptx" if acc == "fp32" else "plain", "RUN": how.run, "BLOCK": how.block,
        }  # fmt: skip
        form = "endpoint" if endpoint else "velocity"
        yield variant(f"flow_loss C={channels} {form} {kind} {dtype}", _flow_loss, pointers, constants, how.options)
    pointers = {"sums": "fp64", "counts": "i32", "loss": "fp32", "count": "i64"}
    constants = {"MEAN": True, "EACH": False, "BLOCK": 1024}
    yield variant("flow_loss second stage", _finish, pointers, constants, compile_options(4))
    for channels, dtype in ((3, "bf16"), (16, "fp32")):
        pointers = {"grad_loss": "fp32", "residual": dtype, "count": "i64", "out": dtype}
        constants = {
            "R_LAYOUT": VECTOR, "G_LAYOUT": VECTOR, "OUT_LAYOUT": VECTOR, "C": channels, "MEAN": True, "EACH": False,
            "ACC": tl.float32, "BLOCK": block_of(channels),
        }  # fmt: skip
        yield variant(f"flow_loss_bwd C={channels} {dtype}", _scale, pointers, constants, compile_options(4))
