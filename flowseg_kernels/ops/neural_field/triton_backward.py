"""Triton backward of the neural field, for which the forward kernel has written the states between the blocks, normalised.

`rows_kernel` takes some pixels of a patch back through all blocks with the gradient in registers; `weights_kernel` takes one
block of one patch and sums over its pixels. No program adds to memory another one adds to.

Two sums over pixels are read off other results: with N = n(h)^T dz for a block's normalised states, dW1n = g N (g by rows) and
dg = rowsum(N W1n); likewise the output layer's gain.
"""

import triton
import triton.language as tl

from ..triton_pixels import rounded
from .triton_forward import (
    dense_places,
    image_places,
    load_embedding,
    load_tile,
    load_vector,
    product,
    silu_and_tanh,
    store_tile,
)


@triton.jit
def held(v, dtype: tl.constexpr):
    """v in another type; in fp16 within its range: over the length of a column of zeros it is infinite, and times these NaN."""
    if dtype == tl.float16:
        v = tl.minimum(tl.maximum(v, -65504.0), 65504.0)
    return rounded(v, dtype)


@triton.jit
def norm_backward(grad, normal, scale, H: tl.constexpr):
    """Gradient of h from that of normal = h * scale, scale = 1 / rms(h)."""
    return scale[:, None] * (grad - normal * (tl.sum(grad * normal, 1) / H)[:, None])


@triton.jit
def silu_and_slope(y, TANH: tl.constexpr):
    """SiLU of z = 2 y, and s with 1 + s twice its derivative: with t = tanh(y), 2 d(u)/dz = 1 + t + u (1 - t)."""
    u, t = silu_and_tanh(y, TANH)
    return u, t + u * (1 - t)


@triton.jit
def unit_first(
    weights, scales, column, wide,
    H: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, SHAVED: tl.constexpr,
):  # fmt: skip
    """A slice (HP, SLICE) of W1 with columns of unit length."""
    scale1 = load_vector(scales, wide, WIDE, WIDE % SLICE != 0)
    return load_tile(weights, column, wide, H, WIDE, SHAVED).to(tl.float32) * scale1[None, :]


@triton.jit
def unit_second(
    weights, scales, column, wide, H: tl.constexpr, WIDE: tl.constexpr, SHAVED: tl.constexpr, BOTH: tl.constexpr
):
    """A slice (SLICE, HP) of W2, with columns of unit length where BOTH are normalised."""
    unit = load_tile(weights + H * WIDE, wide, column, WIDE, H, SHAVED).to(tl.float32)
    if BOTH:
        unit *= load_vector(scales + WIDE, column, H, SHAVED)[None, :]
    return unit


@triton.jit(
    do_not_specialize=[
        "first", "columns", "per_image", "depth", "features", "sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw"
    ]
)  # fmt: skip
def rows_kernel(
    x, grad, weights, embed, gains, out_gain, out_weight, states, norms, scales, grad_x, grads, partials,
    first, columns, per_image, depth, features,
    sb: tl.int64, sc: tl.int64, sh: tl.int64, sw: tl.int64, gb: tl.int64, gc: tl.int64, gh: tl.int64, gw: tl.int64,
    H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, BOTH: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Gradients of x, and of the state: `grads` (n, L + 1, p^2, Hx), after each block and, last, of the embedding.

    A row of `partials` is this program's share of the gradients of out_gain (Hx), out_weight (C, Hx) and the embedding's weights on
    the channels (Hx, C)."""
    TILES: tl.constexpr = (P * P + ROWS - 1) // ROWS
    SHAVED: tl.constexpr = HP != H or WIDE % SLICE != 0
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    # Where `grads` holds all of g, the registers need not hold it too through a block's products.
    PARK: tl.constexpr = grads.dtype.element_ty == tl.float32
    local = (tl.program_id(0) // TILES).to(tl.int64)
    patch = first + local
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HP)
    channel = tl.arange(0, CP)
    states += local * (depth + 1) * (P * P * H)
    grads += local * (depth + 1) * (P * P * H)
    norms += local * (depth + 1) * (P * P)
    partials += tl.program_id(0).to(tl.int64) * ((1 + 2 * C) * H)

    at, exists = image_places(patch, row, channel, columns, per_image, gb, gc, gh, gw, P, C)
    g_out = tl.load(grad + at, mask=exists, other=0.0).to(OPERAND)
    h = load_tile(states + depth * (P * P * H), row, column, P * P, H, PARTIAL).to(tl.float32)
    # Rows beyond the patch have a zero gradient, so they add nothing here, whatever their states hold.
    by_out = product(tl.trans(g_out), rounded(h, OPERAND), PRECISION, UPCAST)
    leaving = load_tile(out_weight, channel, column, C, H, True)
    g = product(g_out, leaving.to(OPERAND), PRECISION, UPCAST)
    if RESIDUAL:
        last_gain = load_vector(out_gain, column, H, HP != H)[None, :]
        tl.store(partials + column, tl.sum(by_out * leaving.to(tl.float32), 0), mask=column < H)
        by_out *= last_gain
        g = norm_backward(g * last_gain, h, load_vector(norms + depth * (P * P), row, P * P, PARTIAL), H)
    store_tile(partials + H, channel, column, by_out, C, H, True)

    for back in range(depth):
        level = depth - 1 - back
        store_tile(grads + level * (P * P * H), row, column, g, P * P, H, PARTIAL)
        entered = load_tile(states + level * (P * P * H), row, column, P * P, H, PARTIAL)
        if RESIDUAL:
            gain = load_vector(gains + level * H, column, H, HP != H)
            entered = entered.to(tl.float32) * gain[None, :]
        entered = rounded(entered, OPERAND)
        block = weights + (patch * depth + level) * (2 * WIDE * H)
        lengths = scales + (local * depth + level) * (WIDE + H)
        if BOTH:
            g_in = held(g * load_vector(lengths + WIDE, column, H, HP != H)[None, :], OPERAND)
        else:
            g_in = rounded(g, OPERAND)
        into = tl.zeros_like(g)
        for start in range(0, WIDE, SLICE):
            wide = start + tl.arange(0, SLICE)
            half1 = 0.5 * load_vector(lengths, wide, WIDE, WIDE % SLICE != 0)[None, :]
            w1 = load_tile(block, column, wide, H, WIDE, SHAVED).to(OPERAND)
            slope = silu_and_slope(product(entered, w1, PRECISION, UPCAST) * half1, TANH)[1]
            w2 = load_tile(block + H * WIDE, wide, column, WIDE, H, SHAVED).to(OPERAND)
            g_wide = product(g_in, tl.trans(w2), PRECISION, UPCAST) * half1
            into += product(held(g_wide * slope + g_wide, OPERAND), tl.trans(w1), PRECISION, UPCAST)
        if RESIDUAL:
            # Read again rather than held in registers through the products.
            h = load_tile(states + level * (P * P * H), row, column, P * P, H, PARTIAL).to(tl.float32)
            scale = load_vector(norms + level * (P * P), row, P * P, PARTIAL)
            gain = load_vector(gains + level * H, column, H, HP != H)
            if PARK:
                g = load_tile(grads + level * (P * P * H), row, column, P * P, H, PARTIAL)
            g += norm_backward(into * gain[None, :], h, scale, H)
        else:
            g = into
    store_tile(grads + depth * (P * P * H), row, column, g, P * P, H, PARTIAL)

    g_in = rounded(g, OPERAND)
    at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
    pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
    by_pixel = product(tl.trans(g_in), pixels, PRECISION, UPCAST)
    store_tile(partials + (1 + C) * H, column, channel, by_pixel, H, C, True)
    from_embed = tl.trans(load_embedding(embed, column, channel, features, H, C).to(OPERAND))
    at, exists = dense_places(patch, row, channel, columns, per_image, P, C)
    tl.store(grad_x + at, rounded(product(g_in, from_embed, PRECISION, UPCAST), grad_x.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first", "depth"])
def weights_kernel(
    weights, gains, states, grads, scales, grad_weights, grad_gains, first, depth,
    H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    BOTH: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    """Gradient of the generated weights of one block of one patch, and the patch's share (n, L, Hx) of the gains' gradient."""
    SHAVED: tl.constexpr = HP != H or WIDE % SLICE != 0
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    local = (tl.program_id(0) // depth).to(tl.int64)
    level = tl.program_id(0) % depth
    column = tl.arange(0, HP)
    at = ((first + local) * depth + level) * (2 * WIDE * H)
    weights += at
    grad_weights += at
    states += (local * (depth + 1) + level) * (P * P * H)
    grads += (local * (depth + 1) + level) * (P * P * H)
    scales += (local * depth + level) * (WIDE + H)
    along_gain = tl.zeros((HP,), tl.float32)
    if BOTH:
        # Sum down each column of the gradient of the normalised W2 times the normalised W2.
        along2 = tl.zeros((HP,), tl.float32)
    for start in range(0, WIDE, SLICE):
        wide = start + tl.arange(0, SLICE)
        # Unlike rows_kernel this one uses a slice for many pixels: gains and lengths go into the weights, not the products.
        unit1 = unit_first(weights, scales, column, wide, H, WIDE, SLICE, SHAVED)
        if RESIDUAL:
            unit1 *= load_vector(gains + level * H, column, H, HP != H)[:, None]
        # Halved, as silu_and_slope wants z and gives the derivative.
        unit1 = rounded(0.5 * unit1, OPERAND)
        unit2 = tl.trans(rounded(0.5 * unit_second(weights, scales, column, wide, H, WIDE, SHAVED, BOTH), OPERAND))
        into1 = tl.zeros((HP, SLICE), tl.float32)
        # Transposed, as then both sums have Hx rows, enough for the widest matrix instruction.
        into2 = tl.zeros((HP, SLICE), tl.float32)
        for top in range(0, P * P, ROWS):
            row = top + tl.arange(0, ROWS)
            normal = rounded(load_tile(states, row, column, P * P, H, PARTIAL), OPERAND)
            u, slope = silu_and_slope(product(normal, unit1, PRECISION, UPCAST), TANH)
            g = rounded(load_tile(grads, row, column, P * P, H, PARTIAL), OPERAND)
            into2 += product(tl.trans(g), rounded(u, OPERAND), PRECISION, UPCAST)
            g_wide = product(g, unit2, PRECISION, UPCAST)
            into1 += product(tl.trans(normal), rounded(g_wide * slope + g_wide, OPERAND), PRECISION, UPCAST)
        unit = unit_first(weights, scales, column, wide, H, WIDE, SLICE, SHAVED)
        if RESIDUAL:
            along_gain += tl.sum(into1 * unit, 1)
            into1 *= load_vector(gains + level * H, column, H, HP != H)[:, None]
        scale1 = load_vector(scales, wide, WIDE, WIDE % SLICE != 0)
        into1 = scale1[None, :] * (into1 - unit * tl.sum(into1 * unit, 0)[None, :])
        store_tile(grad_weights, column, wide, into1, H, WIDE, SHAVED)
        into2 = tl.trans(into2)
        if BOTH:
            unit = unit_second(weights, scales, column, wide, H, WIDE, SHAVED, BOTH)
            along2 += tl.sum(into2 * unit, 0)
            if WIDE <= SLICE:
                into2 = load_vector(scales + WIDE, column, H, HP != H)[None, :] * (into2 - unit * along2[None, :])
        store_tile(grad_weights + H * WIDE, wide, column, into2, WIDE, H, SHAVED)
    if BOTH and WIDE > SLICE:
        # A column of W2 runs through all slices: its sum is known only now, so the slices are taken up again. A thread may read
        # what another one of this program wrote.
        tl.debug_barrier()
        scale2 = load_vector(scales + WIDE, column, H, HP != H)
        for start in range(0, WIDE, SLICE):
            wide = start + tl.arange(0, SLICE)
            into2 = load_tile(grad_weights + H * WIDE, wide, column, WIDE, H, SHAVED).to(tl.float32)
            unit = unit_second(weights, scales, column, wide, H, WIDE, SHAVED, BOTH)
            store_tile(
                grad_weights + H * WIDE,
                wide,
                column,
                scale2[None, :] * (into2 - unit * along2[None, :]),
                WIDE,
                H,
                SHAVED,
            )
    if RESIDUAL:
        tl.store(grad_gains + (local * depth + level) * H + column, along_gain, mask=column < H)
