"""Triton kernels of flow_interpolate: x_t = (1 - t) x0 + t mu_y, and its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.triton import (
    aligned,
    compile_options,
    elementwise_block,
    on_device_of,
    over_blocks,
    pixel_strides,
)
from ..triton_pixels import block_of_program, gather_codes, load_classes, load_pixels, store_pixels

__all__ = ["flow_interpolate", "flow_interpolate_bwd"]

_SIZES = ["width", "pixels", "blocks", "classes", "ignore_index", "l_b", "l_h", "l_w", "t_b"]
_X_STRIDES = ["x_b", "x_c", "x_h", "x_w"]
_G_STRIDES = ["g_b", "g_c", "g_h", "g_w"]


@triton.jit(do_not_specialize=[*_X_STRIDES, *_SIZES])
def _interpolate(
    x,  # source (B, C, H, W)
    labels,  # (B, H, W)
    t,  # (B,)
    centroids,  # (K, C)
    out,  # (B, C, H, W), contiguous
    # strides of x and of labels
    x_b, x_c, x_h, x_w, l_b, l_h, l_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, t_b, classes, ignore_index,
    X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    source = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
    y = load_classes(labels, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    time = tl.load(t + image * t_b).to(acc)
    code = gather_codes(centroids, y, C)
    moved = ()
    for c in tl.static_range(C):
        moved = moved + (tl.where(y >= 0, (1.0 - time) * source[c] + time * code[c], source[c]),)
    store_pixels(out, moved, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)


@triton.jit(do_not_specialize=[*_X_STRIDES, *_G_STRIDES, *_SIZES])
def _interpolate_backward(
    grad,  # (B, C, H, W)
    x,  # source (B, C, H, W)
    labels,  # (B, H, W)
    t,  # (B,)
    centroids,  # (K, C)
    grad_source,  # (B, C, H, W), contiguous
    partial,  # (B, blocks) fp64: the sum of each block for the gradient of t
    # strides of grad, x and labels
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, l_b, l_h, l_w,
    # sizes: pixels and blocks per image
    width, pixels, blocks, t_b, classes, ignore_index,
    G_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr, L_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    C: tl.constexpr, NEED_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the source and of t. The host sums `partial` in a fixed order, so every run gives the same bits."""
    image, start, inside = block_of_program(pixels, blocks, X_LAYOUT, BLOCK)
    acc: tl.constexpr = centroids.dtype.element_ty
    g = load_pixels(grad, image, g_b, g_c, g_h, g_w, start, width, inside, G_LAYOUT, C, acc, BLOCK)
    y = load_classes(labels, image, l_b, l_h, l_w, start, width, inside, classes, ignore_index, L_LAYOUT, BLOCK)
    time = tl.load(t + image * t_b).to(acc)
    if NEED_T:
        source = load_pixels(x, image, x_b, x_c, x_h, x_w, start, width, inside, X_LAYOUT, C, acc, BLOCK)
        code = gather_codes(centroids, y, C)
        total = tl.zeros([BLOCK], tl.float64)
        for c in tl.static_range(C):
            total += tl.where(y >= 0, g[c] * (code[c] - source[c]), 0.0).to(tl.float64)
        tl.store(partial + tl.program_id(0), tl.sum(total, 0))
    scaled = ()
    for c in tl.static_range(C):
        scaled = scaled + (tl.where(y >= 0, (1.0 - time) * g[c], g[c]),)
    store_pixels(grad_source, scaled, image, start, pixels, inside, OUT_LAYOUT, C, BLOCK)


def flow_interpolate(
    source: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, centroids: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Return x_t (B, C, H, W), as reference.flow_interpolate. Labels out of range count as ignored."""
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if out.numel() == 0:
        return out
    block = elementwise_block(source.shape[1])
    programs, sizes, layouts = over_blocks(block, X=source, L=labels)
    with on_device_of(source):
        _interpolate[programs](
            source, labels, t, aligned(centroids), out, *sizes, t.stride(0), centroids.shape[0], ignore_index,
            **layouts, OUT_LAYOUT=pixel_strides(out)[1], C=source.shape[1], BLOCK=block, **compile_options(4),
        )  # fmt: skip
    return out


def flow_interpolate_bwd(
    grad: torch.Tensor,
    source: torch.Tensor,
    labels: torch.Tensor,
    t: torch.Tensor,
    centroids: torch.Tensor,
    ignore_index: int,
    need_t: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of source and, with need_t, of t (else empty)."""
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if out.numel() == 0:
        return out, t.new_zeros(t.shape if need_t else (0,))
    block = elementwise_block(source.shape[1])
    programs, sizes, layouts = over_blocks(block, G=grad, X=source, L=labels)
    partial = torch.empty((source.shape[0], sizes[-1]) if need_t else (0,), dtype=torch.float64, device=source.device)
    with on_device_of(source):
        _interpolate_backward[programs](
            grad, source, labels, t, aligned(centroids), out, partial, *sizes, t.stride(0), centroids.shape[0], ignore_index,
            **layouts, OUT_LAYOUT=pixel_strides(out)[1], C=source.shape[1], NEED_T=need_t, BLOCK=block, **compile_options(4),
        )  # fmt: skip
    return out, partial.sum(dim=1).to(t.dtype) if need_t else t.new_empty(0)
