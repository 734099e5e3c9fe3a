"""Triton backward of the neural field, for which the forward kernel has written the states before the blocks, normalised, and the
gradient of the state after the last.

`backward_kernel` takes a patch back through all blocks, for the gradients of the state and of the generated weights at once: what
the two have in common is found once, and the gradient of the state stays on chip where a patch is one tile. `enter_kernel` takes
what is left of it through the embedding, and sums it over patches. No program adds to memory another one adds to.

Two sums over pixels are read off others: with N = n(h)^T dz for a block's normalised states, dW1n = g N (g by rows) and
dg = rowsum(N W1n).
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
    state_before,
    store_tile,
)


@triton.jit
def silu_and_slope(y, TANH: tl.constexpr):
    """SiLU of z = 2 y, and s with 1 + s its derivative in y: with t = tanh(y), d(u)/dy = 1 + t + u (1 - t)."""
    u, t = silu_and_tanh(y, TANH)
    return u, t + u * (1 - t)


@triton.jit
def in_range(v, dtype: tl.constexpr):
    """v in another type; in fp16 within its range: over the length of a column of zeros it is infinite, and times these NaN. What
    is not finite to begin with becomes NaN, so that it is seen in the gradients."""
    if dtype == tl.float16:
        v += 0.0 * v
        v = tl.maximum(v, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return rounded(v, dtype)


@triton.jit
def scaled(g, lengths, column, H: tl.constexpr, HP: tl.constexpr, BOTH: tl.constexpr, OPERAND: tl.constexpr):
    """g over the lengths of the columns of W2, as the products take it: both gradients want it so, and no unit W2."""
    if BOTH:
        g *= load_vector(lengths, column, H, HP != H)[None, :]
    return in_range(g, OPERAND)


@triton.jit(do_not_specialize=["first", "depth", "sums"])
def backward_kernel(
    weights, gains, states, later, norms, scales, grad_weights, partials, grads, raw, first, depth, sums,
    H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, BAND: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BOTH: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TANH: tl.constexpr, LENT: tl.constexpr,
):  # fmt: skip
    """Gradients of the generated weights, and of the state: `grads` (n, p^2, Hx), after the last block, becomes that before the
    first. A patch's share of the gradient of the gains begins its row of `partials`, of `sums` numbers (forward_kernel).

    `raw` (n, 2 r Hx^2) holds the sums over pixels between the tiles of a patch; of one tile, they lie in grad_weights. There they
    are taken up again, BAND columns of W1 and rows of W2 at a time, for what the lengths of the columns add."""
    TILES: tl.constexpr = (P * P + ROWS - 1) // ROWS
    SHAVED: tl.constexpr = HP != H or WIDE % SLICE != 0
    BARRED: tl.constexpr = HP != H or WIDE % BAND != 0
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    local = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HP)
    norms += local * depth * (P * P)
    scales += local * depth * (WIDE + H)
    grads += local * (P * P * H)
    raw += local * (2 * WIDE * H)

    g = load_tile(grads, tl.arange(0, ROWS), column, P * P, H, PARTIAL).to(tl.float32)
    # Carried into the loop, not made where it is used: of an operand that a loop carries, products read shared memory whichever way
    # it lies; what was computed beside them takes registers, and twice.
    g_in = scaled(g, scales + (depth - 1) * (WIDE + H) + WIDE, column, H, HP, BOTH, OPERAND)
    for step in range(depth * TILES):
        level = depth - 1 - step // TILES
        tile = step % TILES
        row = tile * ROWS + tl.arange(0, ROWS)
        lengths = scales + level * (WIDE + H)
        at = ((first + local) * depth + level) * (2 * WIDE * H)
        block = weights + at
        into_block = grad_weights + at
        if LENT:
            normals = state_before(states, grad_weights, local, level, depth, at, H, WIDE, P, True)
        else:
            normals = state_before(states, later, local, level, depth, at, H, WIDE, P, False)
        if TILES > 1:
            held = raw
        else:
            held = into_block
        normal = load_tile(normals, row, column, P * P, H, PARTIAL)
        into = tl.zeros_like(g)
        if RESIDUAL:
            gain = load_vector(gains + level * H, column, H, HP != H)
            # The sum of the products starts at g in its units, so that registers need not hold g beside it.
            scale = load_vector(norms + level * (P * P), row, P * P, PARTIAL)
            if PARTIAL:
                scale = tl.where(row < P * P, scale, 1.0)
            into = g * (1 / scale)[:, None]
            along_g = tl.sum(into * normal.to(tl.float32), 1)
        normal = rounded(normal, OPERAND)
        for start in range(0, WIDE, SLICE):
            wide = start + tl.arange(0, SLICE)
            # Lengths and gains go into the weights, which are fewer than the products; half, as silu_and_slope wants z.
            half1 = 0.5 * load_vector(lengths, wide, WIDE, WIDE % SLICE != 0)[None, :]
            w1 = load_tile(block, column, wide, H, WIDE, SHAVED).to(tl.float32) * half1
            if RESIDUAL:
                w1 *= gain[:, None]
            w1 = rounded(w1, OPERAND)
            w2 = load_tile(block + H * WIDE, wide, column, WIDE, H, SHAVED).to(OPERAND)
            y = product(normal, w1, PRECISION, UPCAST)
            g_wide = product(g_in, tl.trans(w2), PRECISION, UPCAST)
            u, slope = silu_and_slope(y, TANH)
            u = rounded(u, OPERAND)
            g_wide = in_range(g_wide * slope + g_wide, OPERAND)
            into += product(g_wide, tl.trans(w1), PRECISION, UPCAST)
            into1 = product(tl.trans(normal), g_wide, PRECISION, UPCAST)
            # Transposed, as then both sums have Hx rows, enough for the widest matrix instruction.
            into2 = product(tl.trans(g_in), u, PRECISION, UPCAST)
            if TILES > 1:
                if tile > 0:
                    into1 += load_tile(held, column, wide, H, WIDE, SHAVED)
                    into2 += tl.trans(load_tile(held + H * WIDE, wide, column, WIDE, H, SHAVED))
            store_tile(held, column, wide, into1, H, WIDE, SHAVED)
            into2 = tl.trans(rounded(into2, held.dtype.element_ty))
            store_tile(held + H * WIDE, wide, column, into2, WIDE, H, SHAVED)
        if tile == TILES - 1:
            # A thread may read what another one of this program wrote, here and below.
            tl.debug_barrier()
            along_gain = tl.zeros((HP,), tl.float32)
            along2 = tl.zeros((HP,), tl.float32)
            for start in range(0, WIDE, BAND):
                wide = start + tl.arange(0, BAND)
                scale1 = load_vector(lengths, wide, WIDE, WIDE % BAND != 0)[None, :]
                unit = load_tile(block, column, wide, H, WIDE, BARRED).to(tl.float32) * scale1
                into1 = 0.5 * load_tile(held, column, wide, H, WIDE, BARRED).to(tl.float32)
                if RESIDUAL:
                    along_gain += tl.sum(into1 * unit, 1)
                    into1 *= gain[:, None]
                into1 = scale1 * (into1 - unit * tl.sum(into1 * unit, 0)[None, :])
                store_tile(into_block, column, wide, into1, H, WIDE, BARRED)
                into2 = load_tile(held + H * WIDE, wide, column, WIDE, H, BARRED).to(tl.float32)
                if BOTH:
                    raw2 = load_tile(block + H * WIDE, wide, column, WIDE, H, BARRED).to(tl.float32)
                    along2 += tl.sum(into2 * raw2, 0)
                elif TILES > 1:
                    store_tile(into_block + H * WIDE, wide, column, into2, WIDE, H, BARRED)
            if BOTH:
                # A column of W2 runs through all bands: its sum is known only now.
                scale2 = load_vector(lengths + WIDE, column, H, HP != H)
                along2 *= scale2 * scale2
                for start in range(0, WIDE, BAND):
                    wide = start + tl.arange(0, BAND)
                    into2 = load_tile(held + H * WIDE, wide, column, WIDE, H, BARRED).to(tl.float32)
                    raw2 = load_tile(block + H * WIDE, wide, column, WIDE, H, BARRED).to(tl.float32)
                    store_tile(into_block + H * WIDE, wide, column, into2 - raw2 * along2[None, :], WIDE, H, BARRED)
            if RESIDUAL:
                tl.store(partials + (first + local) * sums + level * H + column, along_gain, mask=column < H)
        if RESIDUAL:
            # Read again rather than held in registers through the products.
            normal = load_tile(normals, row, column, P * P, H, PARTIAL).to(tl.float32)
            along = (tl.sum(into * normal, 1) - along_g) / H
            g = load_vector(norms + level * (P * P), row, P * P, PARTIAL)[:, None] * (into - normal * along[:, None])
        else:
            g = into
        if TILES > 1:
            store_tile(grads, row, column, g, P * P, H, PARTIAL)
            tl.debug_barrier()
            row = ((step + 1) % TILES) * ROWS + tl.arange(0, ROWS)
            g = load_tile(grads, row, column, P * P, H, PARTIAL)
        elif LENT:
            # The next block's gradients overwrite the state that another thread may still read.
            tl.debug_barrier()
        coming = tl.maximum(depth - 1 - (step + 1) // TILES, 0)
        g_in = scaled(g, scales + coming * (WIDE + H) + WIDE, column, H, HP, BOTH, OPERAND)
    if TILES == 1:
        store_tile(grads, tl.arange(0, ROWS), column, g, P * P, H, PARTIAL)


@triton.jit(
    do_not_specialize=[
        "first", "columns", "per_image", "features", "sb", "sc", "sh", "sw", "patches", "shares", "together"
    ]
)  # fmt: skip
def enter_kernel(
    x, embed, grads, grad_x, partials,
    first, columns, per_image, features, sb: tl.int64, sc: tl.int64, sh: tl.int64, sw: tl.int64, patches, shares, together,
    H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of x from that of the embedding's result. A program takes the same pixels of `together` patches one after another.
    Their row of `partials`, `shares` rows after those of earlier rounds, has their share of the gradient's sum over patches
    (p^2, Hx), then of each tile that of the gradient of the embedding's weights on the channels (Hx, C)."""
    TILES: tl.constexpr = (P * P + ROWS - 1) // ROWS
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    share = tl.program_id(0) // TILES
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HP)
    channel = tl.arange(0, CP)
    from_embed = tl.trans(load_embedding(embed, column, channel, features, H, C).to(OPERAND))
    by_position = tl.zeros((ROWS, HP), tl.float32)
    by_pixel = tl.zeros((HP, CP), tl.float32)
    for local in range(share * together, tl.minimum((share + 1) * together, patches)):
        g = load_tile(grads + tl.cast(local, tl.int64) * (P * P * H), row, column, P * P, H, PARTIAL)
        by_position += g.to(tl.float32)
        g_in = rounded(g, OPERAND)
        patch = first + local
        at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
        pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
        by_pixel += product(tl.trans(g_in), pixels, PRECISION, UPCAST)
        at, exists = dense_places(patch, row, channel, columns, per_image, P, C)
        into = rounded(product(g_in, from_embed, PRECISION, UPCAST), grad_x.dtype.element_ty)
        tl.store(grad_x + at, into, mask=exists)
    into = partials + (shares + share).to(tl.int64) * (P * P * H + TILES * (H * C))
    store_tile(into, row, column, by_position, P * P, H, PARTIAL)
    into += P * P * H + (tl.program_id(0) % TILES) * (H * C)
    store_tile(into, column, channel, by_pixel, H, C, True)


@triton.jit(do_not_specialize=["freqs", "depth"])
def finish_kernel(
    by_patch, by_share, waves, grad_embed, grad_bias, grad_gains, grad_out_gain, grad_out_weight, grad_out_bias,
    freqs, depth,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, LEAVING: tl.constexpr, ENTERING: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of what patches share, from the sums over the rows that forward_kernel and backward_kernel (`by_patch`, LEAVING
    tiles) and enter_kernel (`by_share`, ENTERING tiles) left. A program takes one of the Hx hidden units.

    Sums over pixels are in fp64, as the feature of frequency 0 is one everywhere: in fp32 its sum over pixels had up to 2.2 times
    PyTorch's error."""
    unit = tl.program_id(0)
    channel = tl.arange(0, CP)
    count = freqs * freqs
    embed = grad_embed + unit * (C + count)
    for start in range(0, count, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        found = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, P * P, BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            g = tl.load(by_share + pixel * H + unit, mask=pixel < P * P, other=0.0).to(tl.float64)
            exists = (pixel < P * P)[:, None] & (feature < count)[None, :]
            wave = tl.load(waves + pixel[:, None] * count + feature[None, :], mask=exists, other=0.0)
            found += tl.sum(g[:, None] * wave.to(tl.float64), 0)
        found = rounded(found.to(tl.float32), grad_embed.dtype.element_ty)
        tl.store(embed + C + feature, found, mask=feature < count)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, P * P, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        total += tl.load(by_share + pixel * H + unit, mask=pixel < P * P, other=0.0).to(tl.float64)
    tl.store(grad_bias + unit, rounded(tl.sum(total, 0).to(tl.float32), grad_bias.dtype.element_ty))

    by_pixel = tl.zeros((CP,), tl.float32)
    for tile in range(ENTERING):
        by_pixel += load_vector(by_share + P * P * H + tile * (H * C) + unit * C, channel, C, True)
    tl.store(embed + channel, rounded(by_pixel, grad_embed.dtype.element_ty), mask=channel < C)

    by_gain = 0.0
    by_weight = tl.zeros((CP,), tl.float32)
    by_bias = tl.zeros((CP,), tl.float32)
    for tile in range(LEAVING):
        leaving = by_patch + depth * H + tile * ((1 + C) * H + C)
        if RESIDUAL:
            by_gain += tl.load(leaving + unit)
        by_weight += tl.load(leaving + H + channel * H + unit, mask=channel < C, other=0.0)
        by_bias += load_vector(leaving + (1 + C) * H, channel, C, True)
    tl.store(
        grad_out_weight + channel * H + unit, rounded(by_weight, grad_out_weight.dtype.element_ty), mask=channel < C
    )
    if unit == 0:
        tl.store(grad_out_bias + channel, rounded(by_bias, grad_out_bias.dtype.element_ty), mask=channel < C)
    if RESIDUAL:
        tl.store(grad_out_gain + unit, rounded(by_gain, grad_out_gain.dtype.element_ty))
        for level in range(depth):
            gain = tl.load(by_patch + level * H + unit)
            tl.store(grad_gains + level * H + unit, rounded(gain, grad_gains.dtype.element_ty))
