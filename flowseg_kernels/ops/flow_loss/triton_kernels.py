"""Triton kernels of flow_loss: loss and residual in one pass over the pixels, and the backward that scales the residual.

Sums take two stages: each program sums a fixed block, then one program adds these sums in a fixed order. Every run gives the same
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.checks import compute_dtype
from ...runtime.triton import (
    INTERPRETED,
    aligned,
    assembly_for,
    compile_options,
    elementwise_block,
    on_device_of,
    over_blocks,
    pixel_strides,
    two_floats,
)
from ..distance_correction.triton_kernels import correct, correction_arguments, launch_settings
from ..triton_pixels import (
    block_of_program,
    combined,
    gather_codes,
    load_classes,
    load_pixels,
    pixel_offsets,
    store_pixels,
    subtract,
)

__all__ = ["flow_loss", "flow_loss_bwd"]


@triton.jit(
    do_not_specialize=[
        "x_b", "x_c", "x_h", "x_w", "s_b", "s_c", "s_h", "s_w", "l_b", "l_h", "l_w", "t_b", "width", "pixels", "blocks",
        "classes", "ignore_index", "eps", "eps_low", "inverse_temperature", "inverse_temperature_low", "max_norm",
        "max_norm_low", "weight", "weight_low", "t_min", "t_min_low",
    ]
)  # fmt: skip
def _flow_loss(
    x,  # prediction (B, C, H, W)
    source,  # (B, C, H, W)
    labels,  # (B, H, W)
    t,  # (B,)
    centroids,  # (K, C)
    residual,  # (B, C, H, W), contiguous, written if NEED_GRAD
    pixel_losses,  # (B, H, W), contiguous, written if PER_PIXEL
    # per program: sum of squared errors (fp64), number of valid pixels (int32)
    sums, counts,
    # strides of x, source and labels
    x_b, x_c, x_h, x_w, s_b, s_c, s_h, s_w, l_b, l_h, l_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, t_b, classes, ignore_index,
    # numbers, each as the sum of two fp32 numbers
    eps, eps_low, inverse_temperature, inverse_temperature_low, max_norm, max_norm_low,
    weight, weight_low, t_min, t_min_low,
    X_LAYOUT: tl.constexpr, S_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    C: tl.constexpr, ENDPOINT: tl.constexpr, ENDPOINT_SPACE: tl.constexpr, CORRECTED: tl.constexpr, ANNEALED: tl.constexpr,
    NEED_GRAD: tl.constexpr, PER_PIXEL: tl.constexpr,
    TRANSFORM: tl.constexpr, UNIT_TEMPERATURE: tl.constexpr, CAPPED: tl.constexpr,
    ASSEMBLY: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First stage: the losses and the residuals of BLOCK pixels of one image, and the program's sum and count.

    x is the prediction: the end point if ENDPOINT, else the velocity.
    """
    classes = tl.cast(classes, tl.int32)
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    y = load_classes(labels, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    time = tl.load(t + image * t_b).to(acc)
    rest = 1.0 - time
    scale = rest * 0.0 + 1.0
    if ENDPOINT and not ENDPOINT_SPACE:
        scale = 1.0 / tl.maximum(rest, combined(t_min, t_min_low, acc))
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
            combined(eps, eps_low, acc),
            combined(inverse_temperature, inverse_temperature_low, acc),
            combined(max_norm, max_norm_low, acc),
            C, TRANSFORM, UNIT_TEMPERATURE, CAPPED, ASSEMBLY, RUN, BLOCK,
        )  # fmt: skip
    # Load the values again, from the cache. Kept during the correction's loop they would take 3 C registers per pixel.
    out = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    target = gather_codes(centroids, y, C)
    if not ENDPOINT:
        x0 = load_pixels(source, image, s_b, s_c, s_h, s_w, start, width, inside, S_LAYOUT, C, acc, BLOCK)
        target = subtract(target, x0, C)
    error = ()
    for c in tl.static_range(C):
        error = error + (scale * (out[c] - target[c]),)
    if CORRECTED:
        factor = combined(weight, weight_low, acc)
        if ANNEALED:
            factor = factor * rest
        corrected = ()
        for c in tl.static_range(C):
            corrected = corrected + (error[c] + factor * grad[c],)
        error = corrected
    residual_scale = scale * 2.0 / C
    square = tl.zeros_like(error[0])
    residuals = ()
    for c in tl.static_range(C):
        e = tl.where(y >= 0, error[c], 0.0)
        square += e * e
        residuals = residuals + (e * residual_scale,)
    square = square / C
    if NEED_GRAD:
        store_pixels(residual, residuals, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)
    if PER_PIXEL:
        tl.store(pixel_losses + image * pixels + start + tl.arange(0, BLOCK), square, mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(square.to(tl.float64), 0))
    tl.store(counts + tl.program_id(0), tl.sum((y >= 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["programs"])
def _finish(
    # per program of the first stage: (programs,)
    sums, counts,
    # results: scalars
    loss, count,
    programs, MEAN: tl.constexpr, PER_PIXEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage: one program adds the sums of all programs of the first stage in their order."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    valid = tl.zeros([BLOCK], tl.int64)
    for start in range(0, programs, BLOCK):
        total += tl.load(sums + start + i, mask=start + i < programs, other=0.0)
        valid += tl.load(counts + start + i, mask=start + i < programs, other=0)
    number = tl.sum(valid, 0)
    tl.store(count, number)
    if not PER_PIXEL:
        value = tl.sum(total, 0)
        if MEAN:
            value = value / tl.maximum(number, 1).to(tl.float64)
        tl.store(loss, value.to(loss.dtype.element_ty))


@triton.jit(
    do_not_specialize=["r_b", "r_c", "r_h", "r_w", "g_b", "g_h", "g_w", "width", "pixels", "blocks"],
)
def _scale(
    grad_loss,  # a scalar; (B, H, W) if PER_PIXEL
    residual,  # (B, C, H, W)
    count,  # a scalar
    out,  # (B, C, H, W), contiguous
    # strides of residual and of grad_loss
    r_b, r_c, r_h, r_w, g_b, g_h, g_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks,
    R_LAYOUT: tl.constexpr, G_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, C: tl.constexpr, MEAN: tl.constexpr,
    PER_PIXEL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward: out = residual * grad_loss, divided by the number of valid pixels if MEAN."""
    image, start, inside = block_of_program(pixels, blocks, R_LAYOUT, BLOCK)
    r = load_pixels(residual, image, r_b, r_c, r_h, r_w, start, width, inside, R_LAYOUT, C, ACC, BLOCK)
    if PER_PIXEL:
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
    """Return the most registers per thread. With either value five programs of two warps fit on a multiprocessor."""
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
    """Return loss, residual and count, as reference.flow_loss. Labels out of range count as ignored."""
    channels = prediction.shape[1]
    device = prediction.device
    per_pixel = reduction == "none"
    residual = torch.empty(prediction.shape if need_grad else (0,), dtype=prediction.dtype, device=device)
    loss = torch.empty(labels.shape if per_pixel else (), dtype=compute_dtype(prediction.dtype), device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    settings = launch_settings(channels, centroids.dtype, INTERPRETED, _registers(channels))
    (programs,), sizes, layouts = over_blocks(settings.block, X=prediction, S=source, L=labels)
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
                CORRECTED=correction_weight != 0, ANNEALED=schedule == "annealed", NEED_GRAD=need_grad, PER_PIXEL=per_pixel,
                ASSEMBLY=assembly_for(centroids.dtype), RUN=settings.run, BLOCK=settings.block, **constants,
                **settings.options,
            )  # fmt: skip
        _finish[(1,)](
            sums, counts, loss, count, programs,
            MEAN=reduction == "mean", PER_PIXEL=per_pixel, BLOCK=1024, **compile_options(4),
        )  # fmt: skip
    return loss, residual, count


def flow_loss_bwd(
    grad_loss: torch.Tensor, residual: torch.Tensor, count: torch.Tensor, prediction: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Return the gradient of the prediction, in its dtype: the saved residual times the gradient of the loss."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out.numel() == 0:
        return out
    channels = residual.shape[1]
    per_pixel = reduction == "none"
    block = elementwise_block(channels)
    # A scalar gradient is expanded to (B, H, W) only to get strides for it; the kernel reads the scalar.
    programs, sizes, layouts = over_blocks(
        block, R=residual, G=grad_loss if per_pixel else grad_loss.expand(residual[:, 0].shape)
    )
    with on_device_of(residual):
        _scale[programs](
            grad_loss, residual, count, out, *sizes,
            **layouts, OUT_LAYOUT=pixel_strides(out)[1], C=channels, MEAN=reduction == "mean",
            PER_PIXEL=per_pixel,
            ACC=tl.float64 if residual.dtype == torch.float64 else tl.float32, BLOCK=block, **compile_options(4),
        )  # fmt: skip
    return out
