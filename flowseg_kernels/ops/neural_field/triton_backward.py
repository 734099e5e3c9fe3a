"""Triton backward of the neural field: two kernels over patches, which recompute what the forward did not keep.

`rows_kernel` takes some pixels of a patch forward, writing the state before each block to a scratch buffer, then back, with the gradient in
registers; `weights_kernel` takes one block of one patch and sums over its pixels. Neither adds to memory another program adds to.
"""

import triton
import triton.language as tl

from .triton_forward import (
    block_step,
    dense_places,
    embedded,
    entering,
    image_places,
    load_embedding,
    load_tile,
    load_vector,
    product,
    root_mean_square,
    sigmoid,
    store_tile,
)


@triton.jit
def norm_backward(grad, normal, scale, H: tl.constexpr):
    """Gradient of h from that of normal = h * scale, scale = 1 / rms(h)."""
    return scale[:, None] * (grad - normal * (tl.sum(grad * normal, 1) / H)[:, None])


@triton.jit
def silu_and_slope(z, TANH: tl.constexpr):
    gate = sigmoid(z, TANH)
    u = z * gate
    return u, gate + u * (1 - gate)


@triton.jit(do_not_specialize=["first", "columns", "per_image", "depth", "features", "sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw"])  # fmt: skip
def rows_kernel(
    x, grad, weights, embed, table, gains, out_gain, out_weight, grad_x, states, grads, scales, partials,
    first, columns, per_image, depth, features,
    sb: tl.int64, sc: tl.int64, sh: tl.int64, sw: tl.int64, gb: tl.int64, gc: tl.int64, gh: tl.int64, gw: tl.int64, eps,
    H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, BOTH: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Gradients of x; for weights_kernel the states (n, L, p^2, Hx) before each block, the gradients (n, L + 1, p^2, Hx) after each
    and before the first, and the reciprocal column lengths (n, tiles, L, r Hx + Hx); and this program's share of the shared ones'
    gradients, a row of `partials`: gains (L, Hx), out_gain (Hx), out_weight (C, Hx), embedding on the channels (Hx, C), out_bias (C)."""
    TILES: tl.constexpr = (P * P + ROWS - 1) // ROWS
    SHAVED: tl.constexpr = HP != H or WIDE % SLICE != 0
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    local = tl.program_id(0) // TILES
    patch = first + local
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HP)
    channel = tl.arange(0, CP)
    by_channel = (channel < C)[None, :] & (column < H)[:, None]
    states += local.to(tl.int64) * depth * (P * P * H)
    grads += local.to(tl.int64) * (depth + 1) * (P * P * H)
    scales += tl.program_id(0).to(tl.int64) * depth * (WIDE + H)
    partials += tl.program_id(0).to(tl.int64) * ((depth + 1 + 2 * C) * H + C)

    at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
    pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
    h = embedded(pixels, embed, table, row, column, channel, features, H, P, C, PARTIAL, OPERAND, PRECISION, UPCAST)
    for level in range(depth):
        store_tile(states + level * (P * P * H), row, column, h, P * P, H, PARTIAL)
        block = weights + (patch.to(tl.int64) * depth + level) * (2 * WIDE * H)
        gain = load_vector(gains + level * H, column, H, HP != H) if RESIDUAL else 1.0
        h = block_step(
            h, gain, block, scales + level * (WIDE + H), column, eps,
            H, WIDE, SLICE, SHAVED, BOTH, RESIDUAL, True, OPERAND, PRECISION, UPCAST, TANH,
        )  # fmt: skip

    at, exists = image_places(patch, row, channel, columns, per_image, gb, gc, gh, gw, P, C)
    g_out = tl.load(grad + at, mask=exists, other=0.0).to(OPERAND)
    gain = load_vector(out_gain, column, H, HP != H) if RESIDUAL else 1.0
    last = entering(h, gain, eps, H, RESIDUAL).to(OPERAND)
    # Rows beyond the patch have a zero gradient, so whatever their states hold adds nothing to a sum.
    by_out = product(tl.trans(last), g_out, PRECISION, UPCAST)
    after = partials + (depth + 1) * H
    tl.store(after + channel[None, :] * H + column[:, None], by_out, mask=by_channel)
    tl.store(after + 2 * C * H + channel, tl.sum(g_out.to(tl.float32), 0), mask=channel < C)
    leaving = load_tile(out_weight, channel, column, C, H, True).to(OPERAND)
    g = product(g_out, leaving, PRECISION, UPCAST)
    if RESIDUAL:
        scale = root_mean_square(h, eps, H)
        normal = h * scale[:, None]
        tl.store(partials + depth * H + column, tl.sum(g * normal, 0), mask=column < H)
        g = norm_backward(g * gain[None, :], normal, scale, H)

    # A thread may read what another one of this program wrote.
    tl.debug_barrier()
    for back in range(depth):
        level = depth - 1 - back
        store_tile(grads + level * (P * P * H), row, column, g, P * P, H, PARTIAL)
        h = load_tile(states + level * (P * P * H), row, column, P * P, H, PARTIAL).to(tl.float32)
        gain = load_vector(gains + level * H, column, H, HP != H) if RESIDUAL else 1.0
        entered = entering(h, gain, eps, H, RESIDUAL).to(OPERAND)
        block = weights + (patch.to(tl.int64) * depth + level) * (2 * WIDE * H)
        lengths = scales + level * (WIDE + H)
        if BOTH:
            g_in = (g * load_vector(lengths + WIDE, column, H, HP != H)[None, :]).to(OPERAND)
        else:
            g_in = g.to(OPERAND)
        into = tl.zeros_like(g)
        for start in range(0, WIDE, SLICE):
            wide = start + tl.arange(0, SLICE)
            scale1 = load_vector(lengths, wide, WIDE, WIDE % SLICE != 0)
            w1 = load_tile(block, column, wide, H, WIDE, SHAVED).to(OPERAND)
            slope = silu_and_slope(product(entered, w1, PRECISION, UPCAST) * scale1[None, :], TANH)[1]
            w2 = load_tile(block + H * WIDE, wide, column, WIDE, H, SHAVED).to(OPERAND)
            g_wide = product(g_in, tl.trans(w2), PRECISION, UPCAST) * slope * scale1[None, :]
            into += product(g_wide.to(OPERAND), tl.trans(w1), PRECISION, UPCAST)
        if RESIDUAL:
            # Read again rather than held in registers through the products.
            h = load_tile(states + level * (P * P * H), row, column, P * P, H, PARTIAL).to(tl.float32)
            scale = root_mean_square(h, eps, H)
            normal = h * scale[:, None]
            tl.store(partials + level * H + column, tl.sum(into * normal, 0), mask=column < H)
            g += norm_backward(into * gain[None, :], normal, scale, H)
        else:
            g = into
    store_tile(grads + depth * (P * P * H), row, column, g, P * P, H, PARTIAL)

    g_in = g.to(OPERAND)
    at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
    pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
    by_pixel = product(tl.trans(g_in), pixels, PRECISION, UPCAST)
    after = partials + (depth + 1 + C) * H
    tl.store(after + column[:, None] * C + channel[None, :], by_pixel, mask=by_channel)
    from_embed = tl.trans(load_embedding(embed, column, channel, features, H, C).to(OPERAND))
    at, exists = dense_places(patch, row, channel, columns, per_image, P, C)
    tl.store(grad_x + at, product(g_in, from_embed, PRECISION, UPCAST).to(grad_x.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first", "depth"])
def weights_kernel(
    weights, gains, states, grads, scales, grad_weights, first, depth, eps,
    H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, BOTH: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Gradient of the generated weights of one block of one patch; TILES is that of rows_kernel."""
    SHAVED: tl.constexpr = HP != H or WIDE % SLICE != 0
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    local = tl.program_id(0) // depth
    level = tl.program_id(0) % depth
    column = tl.arange(0, HP)
    at = ((first + local).to(tl.int64) * depth + level) * (2 * WIDE * H)
    weights += at
    grad_weights += at
    states += (local.to(tl.int64) * depth + level) * (P * P * H)
    grads += (local.to(tl.int64) * (depth + 1) + level) * (P * P * H)
    scales += (local.to(tl.int64) * TILES * depth + level) * (WIDE + H)
    gain = load_vector(gains + level * H, column, H, HP != H) if RESIDUAL else 1.0
    if BOTH:
        scale2 = load_vector(scales + WIDE, column, H, HP != H)
        # Sum over the column of the gradient of the normalised W2 times the normalised W2.
        along2 = tl.zeros((HP,), tl.float32)
    for start in range(0, WIDE, SLICE):
        wide = start + tl.arange(0, SLICE)
        scale1 = load_vector(scales, wide, WIDE, WIDE % SLICE != 0)
        w1 = load_tile(weights, column, wide, H, WIDE, SHAVED).to(OPERAND)
        w2 = load_tile(weights + H * WIDE, wide, column, WIDE, H, SHAVED).to(OPERAND)
        into1 = tl.zeros((HP, SLICE), tl.float32)
        into2 = tl.zeros((SLICE, HP), tl.float32)
        for top in range(0, P * P, ROWS):
            row = top + tl.arange(0, ROWS)
            h = load_tile(states, row, column, P * P, H, PARTIAL).to(tl.float32)
            g = load_tile(grads, row, column, P * P, H, PARTIAL)
            entered = entering(h, gain, eps, H, RESIDUAL).to(OPERAND)
            u, slope = silu_and_slope(product(entered, w1, PRECISION, UPCAST) * scale1[None, :], TANH)
            into2 += product(tl.trans(u.to(OPERAND)), g, PRECISION, UPCAST)
            if BOTH:
                g = (g.to(tl.float32) * scale2[None, :]).to(OPERAND)
            g_wide = (product(g, tl.trans(w2), PRECISION, UPCAST) * slope).to(OPERAND)
            into1 += product(tl.trans(entered), g_wide, PRECISION, UPCAST)
        unit1 = load_tile(weights, column, wide, H, WIDE, SHAVED).to(tl.float32) * scale1[None, :]
        into1 = scale1[None, :] * (into1 - unit1 * tl.sum(into1 * unit1, 0)[None, :])
        store_tile(grad_weights, column, wide, into1, H, WIDE, SHAVED)
        if BOTH:
            unit2 = load_tile(weights + H * WIDE, wide, column, WIDE, H, SHAVED).to(tl.float32) * scale2[None, :]
            along2 += tl.sum(into2 * unit2, 0)
            if WIDE <= SLICE:
                into2 = scale2[None, :] * (into2 - unit2 * along2[None, :])
        store_tile(grad_weights + H * WIDE, wide, column, into2, WIDE, H, SHAVED)
    if BOTH and WIDE > SLICE:
        # A column of W2 runs through all slices: its sum is known only now, so the slices are taken up again.
        tl.debug_barrier()
        for start in range(0, WIDE, SLICE):
            wide = start + tl.arange(0, SLICE)
            into2 = load_tile(grad_weights + H * WIDE, wide, column, WIDE, H, SHAVED).to(tl.float32)
            unit2 = load_tile(weights + H * WIDE, wide, column, WIDE, H, SHAVED).to(tl.float32) * scale2[None, :]
            into2 = scale2[None, :] * (into2 - unit2 * along2[None, :])
            store_tile(grad_weights + H * WIDE, wide, column, into2, WIDE, H, SHAVED)
