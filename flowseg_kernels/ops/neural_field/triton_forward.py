"""Triton forward of the neural field: a program takes some pixels of one patch through all blocks, on chip.

The generated weights stream over their wide axis in slices, so the registers a program needs do not grow with r Hx. The lengths of
their columns scale the products, and no normalised weight is ever stored; a program finds the lengths once for several tiles of a
patch, as in each tile anew they would cost as many instructions as all the rest.
"""

import triton
import triton.language as tl

from ..triton_pixels import _INTERPRETED, rounded


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # The interpreter multiplies 16-bit matrices wrongly (bf16) or with 16-bit sums (fp16); fp32 copies of them are exact.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def silu_and_tanh(y, TANH: tl.constexpr):
    """SiLU of z = 2 y, and tanh(y). Whoever scales z halves its scale; y tanh(y) + y is one fused step."""
    # One instruction of the special-function unit instead of two, which bound the whole chain at 16 bit. Its relative error, 2^-11,
    # is one of 2^-12 |z| in SiLU. The interpreter errs by that much one way, so that what passes there holds for it.
    if TANH and _INTERPRETED:
        t = (2 / (1 + tl.exp(-2 * y)) - 1) * (1 + 2.0**-11)
        return y * t + y, t
    elif TANH:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], tl.float32, True, 1)
        return y * t + y, t
    else:
        gate = 2 / (1 + tl.exp(-2 * y))
        return y * gate, gate - 1


@triton.jit
def load_tile(base, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows and columns of a contiguous (HEIGHT, WIDTH) matrix, zero outside it."""
    at = base + row[:, None] * WIDTH + column[None, :]
    if MASKED:
        return tl.load(at, mask=(row < HEIGHT)[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(base, row, column, value, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    at = base + row[:, None] * WIDTH + column[None, :]
    value = rounded(value, base.dtype.element_ty)
    if MASKED:
        tl.store(at, value, mask=(row < HEIGHT)[:, None] & (column < WIDTH)[None, :])
    else:
        tl.store(at, value)


@triton.jit
def load_vector(base, index, SIZE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(base + index, mask=index < SIZE, other=0.0).to(tl.float32)
    return tl.load(base + index).to(tl.float32)


@triton.jit
def image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P: tl.constexpr, C: tl.constexpr):
    """Offsets (rows, channels) of pixels of a patch in an image tensor of any strides, and which of them exist."""
    # A count of patches fits 32 bits, in which a division is a third as long.
    image = tl.cast(patch, tl.int32) // per_image
    cell = tl.cast(patch, tl.int32) - image * per_image
    down = (cell // columns) * P + row // P
    right = (cell % columns) * P + row % P
    pixel = image.to(tl.int64) * sb + down.to(tl.int64) * sh + right.to(tl.int64) * sw
    at = pixel[:, None] + channel.to(tl.int64)[None, :] * sc
    return at, (row < P * P)[:, None] & (channel < C)[None, :]


@triton.jit
def dense_places(patch, row, channel, columns, per_image, P: tl.constexpr, C: tl.constexpr):
    """The same in a contiguous image."""
    width = columns * P
    plane = tl.cast(per_image, tl.int64) * (P * P)
    return image_places(patch, row, channel, columns, per_image, plane * C, plane, width, 1, P, C)


@triton.jit
def load_embedding(embed, column, channel, features, H: tl.constexpr, C: tl.constexpr):
    """(CP, HP): the embedding's weights on the C channels of a pixel, transposed."""
    at = embed + column[None, :] * features + channel[:, None]
    return tl.load(at, mask=(channel < C)[:, None] & (column < H)[None, :], other=0.0)


@triton.jit
def embedded(
    pixels, embed, table, row, column, channel, features,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, PARTIAL: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    into = load_embedding(embed, column, channel, features, H, C).to(OPERAND)
    return product(pixels, into, PRECISION, UPCAST) + load_tile(table, row, column, P * P, H, PARTIAL)


@triton.jit
def root_mean_square(h, eps, H: tl.constexpr):
    """1 / rms of each row."""
    return tl.rsqrt(tl.sum(h * h, 1) / H + eps)


@triton.jit
def reciprocal_lengths(matrix, found, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BAND: tl.constexpr, WP: tl.constexpr):
    """Into `found`, 1 over the lengths of the columns of a contiguous matrix, of which BAND rows are taken at a time."""
    MASKED: tl.constexpr = WP != WIDTH or HEIGHT % BAND != 0
    column = tl.arange(0, WP)
    squares = tl.zeros((BAND, WP), tl.float32)
    for top in range(0, HEIGHT, BAND):
        part = load_tile(matrix, top + tl.arange(0, BAND), column, HEIGHT, WIDTH, MASKED).to(tl.float32)
        squares += part * part
    tl.store(found + column, tl.rsqrt(tl.maximum(tl.sum(squares, 0), 1e-24)), mask=column < WIDTH)


@triton.jit
def block_lengths(
    block, found, H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, WIDEP: tl.constexpr, AREA: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Into `found` (r Hx + Hx), those of W1 and, where BOTH are normalised, of W2 of one block, AREA elements at a time."""
    reciprocal_lengths(block, found, H, WIDE, min(HP, AREA // WIDEP), WIDEP)
    if BOTH:
        reciprocal_lengths(block + H * WIDE, found + WIDE, WIDE, H, min(WIDEP, AREA // HP), HP)


@triton.jit
def normalised(h, eps, H: tl.constexpr, RESIDUAL: tl.constexpr):
    """h over its root mean square by rows, and 1 over that; h itself in the plain form."""
    if RESIDUAL:
        scale = root_mean_square(h, eps, H)
        return h * scale[:, None], scale
    else:
        return h, 1.0


@triton.jit
def norm_backward(grad, normal, scale, H: tl.constexpr):
    """Gradient of h from that of normal = h * scale, scale = 1 / rms(h)."""
    return scale[:, None] * (grad - normal * (tl.sum(grad * normal, 1) / H)[:, None])


@triton.jit
def block_step(
    h, entered, block, lengths, column,
    H: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, SHAVED: tl.constexpr, BOTH: tl.constexpr,
    RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """h after one block that `entered` goes into; its weights begin at `block`, their reciprocal column lengths at `lengths`."""
    entered = rounded(entered, OPERAND)
    out = tl.zeros_like(h)
    for start in range(0, WIDE, SLICE):
        wide = start + tl.arange(0, SLICE)
        half1 = 0.5 * load_vector(lengths, wide, WIDE, WIDE % SLICE != 0)
        w1 = load_tile(block, column, wide, H, WIDE, SHAVED).to(OPERAND)
        u = silu_and_tanh(product(entered, w1, PRECISION, UPCAST) * half1[None, :], TANH)[0]
        w2 = load_tile(block + H * WIDE, wide, column, WIDE, H, SHAVED).to(OPERAND)
        out += product(rounded(u, OPERAND), w2, PRECISION, UPCAST)
    if BOTH:
        out = out * load_vector(lengths + WIDE, column, H, SHAVED)[None, :]
    if RESIDUAL:
        out += h
    return out


@triton.jit
def state_before(
    states, later, local, level, depth, at, H: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr, LENT: tl.constexpr
):  # fmt: skip
    """Where the state of a patch before block `level` lies: the first in `states` (n, p^2, Hx), the others in `later`, of the round
    (n, L - 1, p^2, Hx) or, LENT, in the gradients of the generated weights: there each in the place of the block before its own,
    whose gradients are written when the state has been read for the last time. Those of its own begin at `at`."""
    if LENT:
        found = later + (at - 2 * WIDE * H)
    else:
        found = later + (local * (depth - 1) + (level - 1)) * (P * P * H)
    if level == 0:
        found = states + local * (P * P * H)
    return found


@triton.jit(
    do_not_specialize=[
        "first", "columns", "per_image", "depth", "features", "sums", "sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw"
    ]
)  # fmt: skip
def forward_kernel(
    x, weights, embed, table, gains, out_gain, out_weight, out_bias, out, grad, states, later, norms, scales, grads, partials,
    first, columns, per_image, depth, features, sums,
    sb: tl.int64, sc: tl.int64, sh: tl.int64, sw: tl.int64, gb: tl.int64, gc: tl.int64, gh: tl.int64, gw: tl.int64, eps,
    H: tl.constexpr, HP: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TOGETHER: tl.constexpr, WIDEP: tl.constexpr, AREA: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    BOTH: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr, LENT: tl.constexpr,
):  # fmt: skip
    """Velocity of patches from `first`; with KEEP instead what their backward starts from: the states (state_before) before the
    blocks, normalised, what normalised them (n, L, p^2), and `grads` (n, p^2, Hx), the gradient of the state after the last, from
    `grad` of the velocity. A patch's row of `partials`, `sums` numbers, then has the share of the gradients of the gains (L, Hx),
    which backward_kernel writes, then of each tile those of out_gain (Hx), out_weight (C, Hx) and out_bias (C).

    A program takes TOGETHER tiles of a patch one by one, and leaves the reciprocal lengths (n, L, r Hx + Hx) in `scales`."""
    SHARES: tl.constexpr = (P * P + ROWS * TOGETHER - 1) // (ROWS * TOGETHER)
    SHAVED: tl.constexpr = HP != H or WIDE % SLICE != 0
    PARTIAL: tl.constexpr = HP != H or P * P % ROWS != 0
    local = (tl.program_id(0) // SHARES).to(tl.int64)
    patch = first + local
    column = tl.arange(0, HP)
    channel = tl.arange(0, CP)
    # Programs that share a patch write the same numbers here.
    for level in range(depth):
        block = weights + (patch * depth + level) * (2 * WIDE * H)
        block_lengths(block, scales + (local * depth + level) * (WIDE + H), H, HP, WIDE, WIDEP, AREA, BOTH)
    tl.debug_barrier()
    for tile in range(TOGETHER):
        place = (tl.program_id(0) % SHARES) * TOGETHER + tile
        row = place * ROWS + tl.arange(0, ROWS)
        at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
        pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
        h = embedded(pixels, embed, table, row, column, channel, features, H, P, C, PARTIAL, OPERAND, PRECISION, UPCAST)
        for level in range(depth):
            entered, scale = normalised(h, eps, H, RESIDUAL)
            if KEEP:
                begin = (patch * depth + level) * (2 * WIDE * H)
                state = state_before(states, later, local, level, depth, begin, H, WIDE, P, LENT)
                store_tile(state, row, column, entered, P * P, H, PARTIAL)
                if RESIDUAL:
                    tl.store(norms + (local * depth + level) * (P * P) + row, scale, mask=row < P * P)
            if RESIDUAL:
                entered = entered * load_vector(gains + level * H, column, H, HP != H)[None, :]
            block = weights + (patch * depth + level) * (2 * WIDE * H)
            lengths = scales + (local * depth + level) * (WIDE + H)
            h = block_step(
                h, entered, block, lengths, column,
                H, WIDE, SLICE, SHAVED, BOTH, RESIDUAL, OPERAND, PRECISION, UPCAST, TANH,
            )  # fmt: skip
        last, scale = normalised(h, eps, H, RESIDUAL)
        if KEEP:
            at, exists = image_places(patch, row, channel, columns, per_image, gb, gc, gh, gw, P, C)
            g_out = tl.load(grad + at, mask=exists, other=0.0).to(OPERAND)
            leaving = load_tile(out_weight, channel, column, C, H, True)
            # Rows beyond the patch have a zero gradient, so they add nothing here, whatever their states hold.
            by_out = product(tl.trans(g_out), rounded(last, OPERAND), PRECISION, UPCAST)
            g = product(g_out, leaving.to(OPERAND), PRECISION, UPCAST)
            into = partials + patch * sums + depth * H + place * ((1 + C) * H + C)
            tl.store(into + (1 + C) * H + channel, tl.sum(g_out.to(tl.float32), 0), mask=channel < C)
            if RESIDUAL:
                last_gain = load_vector(out_gain, column, H, HP != H)[None, :]
                # d(out_gain) is read off the same sum over pixels: with M = dv^T n(h), the sum of M's rows times out_weight's.
                tl.store(into + column, tl.sum(by_out * leaving.to(tl.float32), 0), mask=column < H)
                by_out *= last_gain
                g = norm_backward(g * last_gain, last, scale, H)
            store_tile(into + H, channel, column, by_out, C, H, True)
            store_tile(grads + local * (P * P * H), row, column, g, P * P, H, PARTIAL)
        else:
            if RESIDUAL:
                last = last * load_vector(out_gain, column, H, HP != H)[None, :]
            last = rounded(last, OPERAND)
            leaving = tl.trans(load_tile(out_weight, channel, column, C, H, True).to(OPERAND))
            velocity = product(last, leaving, PRECISION, UPCAST) + load_vector(out_bias, channel, C, True)[None, :]
            at, exists = dense_places(patch, row, channel, columns, per_image, P, C)
            tl.store(out + at, rounded(velocity, out.dtype.element_ty), mask=exists)


@triton.jit
def cosine_of_turns(part, turn):
    """cos(2 pi part / turn), 0 <= part <= turn / 2: the sine of pi/2 less that, by its Taylor polynomial of degree 11, within 6e-8.
    tl.cos reduces arguments of any size, and keeps local memory for it."""
    t = (turn - 4 * part) * (1.5707963267948966 / turn)
    q = t * t
    return t * (
        1 - (q * (1 / 6)) * (1 - (q * (1 / 20)) * (1 - (q * (1 / 42)) * (1 - (q * (1 / 72)) * (1 - q * (1 / 110)))))
    )


@triton.jit
def cosine_features(pixel, feature, freqs, P: tl.constexpr):
    """reference.cosine_features at some pixels of a patch, in fp32."""
    i, j = feature // freqs, feature % freqs
    # u f is a fraction of integers, so whole turns leave the argument of the cosine before it is rounded.
    turn = 2 * tl.maximum((P - 1) * (freqs - 1), 1)
    along = ((pixel % P) * i * freqs) % turn
    across = ((pixel // P) * j * freqs) % turn
    wave = cosine_of_turns(tl.minimum(along, turn - along), turn) * cosine_of_turns(
        tl.minimum(across, turn - across), turn
    )
    scale = freqs / tl.maximum(freqs - 1, 1)
    return wave / (1 + scale * scale * (i * j))


@triton.jit(do_not_specialize=["freqs"])
def table_kernel(
    embed, bias, table, waves, freqs, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the embedding adds at each pixel of every patch (p^2, Hx), in fp32; and, unless it is None, `waves` (p^2, F^2)."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, HP)
    count = freqs * freqs
    found = tl.zeros((BLOCK, HP), tl.float32) + load_vector(bias, column, H, HP != H)[None, :]
    for start in range(0, count, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        wave = cosine_features(pixel[:, None], feature[None, :], freqs, P)
        if waves is not None:
            exists = (pixel < P * P)[:, None] & (feature < count)[None, :]
            tl.store(waves + pixel[:, None] * count + feature[None, :], wave, mask=exists)
        exists = (feature < count)[:, None] & (column < H)[None, :]
        into = tl.load(embed + column[None, :] * (C + count) + C + feature[:, None], mask=exists, other=0.0)
        found += tl.dot(wave, into.to(tl.float32), input_precision="ieee")
    store_tile(table, pixel, column, found, P * P, H, True)
