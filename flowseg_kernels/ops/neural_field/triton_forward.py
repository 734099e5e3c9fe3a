"""Triton forward of the neural field: a program takes some pixels of one patch through all blocks, on chip.

- Generated weights are loaded in slices along their inner axis (r Hx), so registers do not grow with r Hx.
- No normalised weight is stored: the products are scaled by the reciprocal column norms ("inverse lengths").
- A program computes the column norms once and then takes several tiles of a patch. Once per tile, the norms would cost as many
  instructions as everything else.

Names: H = Hx hidden units, INNER = r Hx, P = pixels along a side of a patch, C = channels, n = patches of the launch,
L = blocks. *_PADDED is the next power of two. A "row" is a pixel, a "column" a hidden unit.
"""

import triton
import triton.language as tl

from ..triton_pixels import INTERPRETED, rounded


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # The interpreter multiplies bf16 matrices wrongly and sums fp16 products in 16 bits. Products of fp32 copies are exact.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def silu_and_tanh(y, TANH: tl.constexpr):
    """Return SiLU(z) for z = 2 y, and tanh(y). SiLU(z) is y tanh(y) + y: one fused multiply-add. Callers halve the scale of z."""
    # tanh.approx is one special-function instruction, not two; those two were the bottleneck in 16 bits. Its relative error of
    # 2^-11 becomes 2^-12 |z| in SiLU. The interpreter adds exactly that error, so tests that pass there cover the GPU.
    if TANH and INTERPRETED:
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
    """Load rows and columns of a contiguous (HEIGHT, WIDTH) matrix; zero outside it."""
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
    """Return the offsets (rows, channels) of a patch's pixels in x (B, C, H, W) of any strides, and a mask of those that exist."""
    # Patch numbers fit in 32 bits, where a division takes a third of the instructions.
    image = tl.cast(patch, tl.int32) // per_image
    cell = tl.cast(patch, tl.int32) - image * per_image
    down = (cell // columns) * P + row // P
    right = (cell % columns) * P + row % P
    pixel = image.to(tl.int64) * sb + down.to(tl.int64) * sh + right.to(tl.int64) * sw
    at = pixel[:, None] + channel.to(tl.int64)[None, :] * sc
    return at, (row < P * P)[:, None] & (channel < C)[None, :]


@triton.jit
def dense_places(patch, row, channel, columns, per_image, P: tl.constexpr, C: tl.constexpr):
    """Return the same as image_places, for a contiguous image tensor."""
    width = columns * P
    plane = tl.cast(per_image, tl.int64) * (P * P)
    return image_places(patch, row, channel, columns, per_image, plane * C, plane, width, 1, P, C)


@triton.jit
def load_embedding(embed, column, channel, features, H: tl.constexpr, C: tl.constexpr):
    """Load the embedding's weights for the C channels of a pixel, transposed: (C_PADDED, H_PADDED)."""
    at = embed + column[None, :] * features + channel[:, None]
    return tl.load(at, mask=(channel < C)[:, None] & (column < H)[None, :], other=0.0)


@triton.jit
def embedded(
    pixels, embed, table, row, column, channel, features,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, MASK_ROWS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    channel_weights = load_embedding(embed, column, channel, features, H, C).to(OPERAND)
    return product(pixels, channel_weights, PRECISION, UPCAST) + load_tile(table, row, column, P * P, H, MASK_ROWS)


@triton.jit
def reciprocal_rms(h, eps, H: tl.constexpr):
    """Return 1 / rms of each row."""
    return tl.rsqrt(tl.sum(h * h, 1) / H + eps)


@triton.jit
def store_inverse_lengths(
    matrix, found, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BAND: tl.constexpr, W_PADDED: tl.constexpr
):
    """Store the reciprocal column norms of a contiguous (HEIGHT, WIDTH) matrix in `found`. Load BAND rows at a time."""
    MASKED: tl.constexpr = W_PADDED != WIDTH or HEIGHT % BAND != 0
    column = tl.arange(0, W_PADDED)
    squares = tl.zeros((BAND, W_PADDED), tl.float32)
    for top in range(0, HEIGHT, BAND):
        part = load_tile(matrix, top + tl.arange(0, BAND), column, HEIGHT, WIDTH, MASKED).to(tl.float32)
        squares += part * part
    tl.store(found + column, tl.rsqrt(tl.maximum(tl.sum(squares, 0), 1e-24)), mask=column < WIDTH)


@triton.jit
def store_block_inverse_lengths(
    block, found, H: tl.constexpr, H_PADDED: tl.constexpr, INNER: tl.constexpr, INNER_PADDED: tl.constexpr, AREA: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Store the reciprocal column norms of one block in `found` (r Hx + Hx): those of W1 and, if BOTH are normalised, of W2.

    AREA: elements per step.
    """
    store_inverse_lengths(block, found, H, INNER, min(H_PADDED, AREA // INNER_PADDED), INNER_PADDED)
    if BOTH:
        store_inverse_lengths(block + H * INNER, found + INNER, INNER, H, min(INNER_PADDED, AREA // H_PADDED), H_PADDED)


@triton.jit
def normalised(h, eps, H: tl.constexpr, RESIDUAL: tl.constexpr):
    """Return each row of h over its root mean square, and 1 / rms(h). In the plain form return h itself."""
    if RESIDUAL:
        inverse_rms = reciprocal_rms(h, eps, H)
        return h * inverse_rms[:, None], inverse_rms
    else:
        return h, 1.0


@triton.jit
def norm_backward(grad, normal, inverse_rms, H: tl.constexpr):
    """Return the gradient of h from the gradient of normal = h * inverse_rms, where inverse_rms = 1 / rms(h)."""
    return inverse_rms[:, None] * (grad - normal * (tl.sum(grad * normal, 1) / H)[:, None])


@triton.jit
def block_step(
    h, entered, block, inverse_lengths, column,
    H: tl.constexpr, INNER: tl.constexpr, SLICE: tl.constexpr, MASK_SLICES: tl.constexpr, BOTH: tl.constexpr,
    RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Return h after one block with input `entered`.

    `block` points to the block's weights, `inverse_lengths` to their reciprocal column norms.
    """
    entered = rounded(entered, OPERAND)
    out = tl.zeros_like(h)
    for start in range(0, INNER, SLICE):
        inner = start + tl.arange(0, SLICE)
        half_inverse_length1 = 0.5 * load_vector(inverse_lengths, inner, INNER, INNER % SLICE != 0)
        w1 = load_tile(block, column, inner, H, INNER, MASK_SLICES).to(OPERAND)
        u = silu_and_tanh(product(entered, w1, PRECISION, UPCAST) * half_inverse_length1[None, :], TANH)[0]
        w2 = load_tile(block + H * INNER, inner, column, INNER, H, MASK_SLICES).to(OPERAND)
        out += product(rounded(u, OPERAND), w2, PRECISION, UPCAST)
    if BOTH:
        out = out * load_vector(inverse_lengths + INNER, column, H, MASK_SLICES)[None, :]
    if RESIDUAL:
        out += h
    return out


@triton.jit
def state_before(
    states, later_states, local, level, depth, at, H: tl.constexpr, INNER: tl.constexpr, P: tl.constexpr, ALIASED: tl.constexpr
):  # fmt: skip
    """Return the address of a patch's state before block `level`.

    The state before the first block is in `states` (n, p^2, Hx), the others are in `later_states` (n, L - 1, p^2, Hx). If ALIASED,
    `later_states` is the buffer of the weights' gradients, where this block's gradients start at `at`; the state is stored in the
    place of the block before. That block's gradients are written only after this state was read for the last time.
    """
    if ALIASED:
        found = later_states + (at - 2 * INNER * H)
    else:
        found = later_states + (local * (depth - 1) + (level - 1)) * (P * P * H)
    if level == 0:
        found = states + local * (P * P * H)
    return found


@triton.jit(
    do_not_specialize=[
        "first", "columns", "per_image", "depth", "features", "sums", "sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw"
    ]
)  # fmt: skip
def forward_kernel(
    x,  # (B, C, H, W)
    weights,  # (B N, L, 2 r Hx^2): W1 (Hx, r Hx), then W2 (r Hx, Hx) of each block
    embed,  # (Hx, C + F^2)
    table,  # (p^2, Hx) fp32, from table_kernel
    gains,  # (L, Hx)
    out_gain,  # (Hx,)
    out_weight,  # (C, Hx)
    out_bias,  # (C,)
    out,  # (B, C, H, W), contiguous; None with KEEP
    grad,  # with KEEP: gradient of out, (B, C, H, W)
    states, later_states,  # with KEEP: see state_before
    inverse_rms,  # with KEEP: 1 / rms of the states, (n, L, p^2) fp32
    inverse_lengths,  # reciprocal column norms, (n, L, r Hx + Hx) fp32
    grads,  # with KEEP: gradient of the state after the last block, (n, p^2, Hx)
    partials,  # with KEEP: partial sums per patch, (B N, sums) fp32, see below
    # first patch of the launch, patches per row of an image and per image, L, C + F^2, length of a row of `partials`
    first, columns, per_image, depth, features, sums,
    # strides of x and of grad
    sb: tl.int64, sc: tl.int64, sh: tl.int64, sw: tl.int64, gb: tl.int64, gc: tl.int64, gh: tl.int64, gw: tl.int64, eps,
    H: tl.constexpr, H_PADDED: tl.constexpr, INNER: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr, INNER_PADDED: tl.constexpr, AREA: tl.constexpr, C: tl.constexpr, C_PADDED: tl.constexpr,
    BOTH: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, TANH: tl.constexpr, ALIASED: tl.constexpr,
):  # fmt: skip
    """Compute the velocity of patches from `first` on. With KEEP, compute what their backward starts from instead.

    KEEP stores the normalised states before the blocks, their `inverse_rms`, and in `grads` the gradient of the state after the
    last block. A row of `partials` has partial sums of gradients: of the gains (L, Hx), which backward_kernel writes, then per tile
    of out_gain (Hx), out_weight (C, Hx) and out_bias (C).

    A program takes TILES_PER_PROGRAM tiles of a patch in turn. The kernel is one long function, as its values stay in registers.
    """
    PROGRAMS_PER_PATCH: tl.constexpr = (P * P + ROWS * TILES_PER_PROGRAM - 1) // (ROWS * TILES_PER_PROGRAM)
    MASK_SLICES: tl.constexpr = H_PADDED != H or INNER % SLICE != 0
    MASK_ROWS: tl.constexpr = H_PADDED != H or P * P % ROWS != 0
    local = (tl.program_id(0) // PROGRAMS_PER_PATCH).to(tl.int64)
    patch = first + local
    column = tl.arange(0, H_PADDED)
    channel = tl.arange(0, C_PADDED)
    # All programs of a patch write the same numbers.
    for level in range(depth):
        block = weights + (patch * depth + level) * (2 * INNER * H)
        store_block_inverse_lengths(
            block, inverse_lengths + (local * depth + level) * (INNER + H), H, H_PADDED, INNER, INNER_PADDED, AREA, BOTH
        )
    tl.debug_barrier()
    for tile in range(TILES_PER_PROGRAM):
        place = (tl.program_id(0) % PROGRAMS_PER_PATCH) * TILES_PER_PROGRAM + tile
        row = place * ROWS + tl.arange(0, ROWS)
        at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
        pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
        h = embedded(
            pixels, embed, table, row, column, channel, features, H, P, C, MASK_ROWS, OPERAND, PRECISION, UPCAST
        )
        for level in range(depth):
            entered, row_inverse_rms = normalised(h, eps, H, RESIDUAL)
            if KEEP:
                begin = (patch * depth + level) * (2 * INNER * H)
                state = state_before(states, later_states, local, level, depth, begin, H, INNER, P, ALIASED)
                store_tile(state, row, column, entered, P * P, H, MASK_ROWS)
                if RESIDUAL:
                    tl.store(inverse_rms + (local * depth + level) * (P * P) + row, row_inverse_rms, mask=row < P * P)
            if RESIDUAL:
                entered = entered * load_vector(gains + level * H, column, H, H_PADDED != H)[None, :]
            block = weights + (patch * depth + level) * (2 * INNER * H)
            block_inverse_lengths = inverse_lengths + (local * depth + level) * (INNER + H)
            h = block_step(
                h, entered, block, block_inverse_lengths, column,
                H, INNER, SLICE, MASK_SLICES, BOTH, RESIDUAL, OPERAND, PRECISION, UPCAST, TANH,
            )  # fmt: skip
        last, row_inverse_rms = normalised(h, eps, H, RESIDUAL)
        if KEEP:
            at, exists = image_places(patch, row, channel, columns, per_image, gb, gc, gh, gw, P, C)
            g_out = tl.load(grad + at, mask=exists, other=0.0).to(OPERAND)
            out_w = load_tile(out_weight, channel, column, C, H, True)
            # Rows beyond the patch have a zero gradient, so they add nothing, whatever is in their states.
            by_out = product(tl.trans(g_out), rounded(last, OPERAND), PRECISION, UPCAST)
            g = product(g_out, out_w.to(OPERAND), PRECISION, UPCAST)
            tile_sums = partials + patch * sums + depth * H + place * ((1 + C) * H + C)
            tl.store(tile_sums + (1 + C) * H + channel, tl.sum(g_out.to(tl.float32), 0), mask=channel < C)
            if RESIDUAL:
                last_gain = load_vector(out_gain, column, H, H_PADDED != H)[None, :]
                # The gradient of out_gain needs no sum over pixels of its own: with M = dv^T n(h), it is the column sum of
                # M * out_weight.
                tl.store(tile_sums + column, tl.sum(by_out * out_w.to(tl.float32), 0), mask=column < H)
                by_out *= last_gain
                g = norm_backward(g * last_gain, last, row_inverse_rms, H)
            store_tile(tile_sums + H, channel, column, by_out, C, H, True)
            store_tile(grads + local * (P * P * H), row, column, g, P * P, H, MASK_ROWS)
        else:
            if RESIDUAL:
                last = last * load_vector(out_gain, column, H, H_PADDED != H)[None, :]
            last = rounded(last, OPERAND)
            out_w = tl.trans(load_tile(out_weight, channel, column, C, H, True).to(OPERAND))
            velocity = product(last, out_w, PRECISION, UPCAST) + load_vector(out_bias, channel, C, True)[None, :]
            at, exists = dense_places(patch, row, channel, columns, per_image, P, C)
            tl.store(out + at, rounded(velocity, out.dtype.element_ty), mask=exists)


@triton.jit
def cosine_of_turns(part, turn):
    """Return cos(2 pi part / turn) for 0 <= part <= turn / 2, within 6e-8.

    It is the sine of pi/2 minus the angle, as a Taylor polynomial of degree 11. tl.cos reduces arguments of any size, for which it
    takes local memory.
    """
    t = (turn - 4 * part) * (1.5707963267948966 / turn)
    q = t * t
    return t * (
        1 - (q * (1 / 6)) * (1 - (q * (1 / 20)) * (1 - (q * (1 / 42)) * (1 - (q * (1 / 72)) * (1 - q * (1 / 110)))))
    )


@triton.jit
def cosine_features(pixel, feature, freqs, P: tl.constexpr):
    """Return reference.cosine_features at some pixels of a patch, in fp32."""
    i, j = feature // freqs, feature % freqs
    # u f is a fraction of integers, so whole turns are removed from the cosine's argument before any rounding.
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
    embed,  # (Hx, C + F^2)
    bias,  # (Hx,)
    table,  # (p^2, Hx) fp32
    waves,  # (p^2, F^2) fp32, or None
    freqs, H: tl.constexpr, H_PADDED: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill `table` with what the embedding adds at each pixel of every patch, and `waves` with the cosine features."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, H_PADDED)
    count = freqs * freqs
    found = tl.zeros((BLOCK, H_PADDED), tl.float32) + load_vector(bias, column, H, H_PADDED != H)[None, :]
    for start in range(0, count, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        wave = cosine_features(pixel[:, None], feature[None, :], freqs, P)
        if waves is not None:
            exists = (pixel < P * P)[:, None] & (feature < count)[None, :]
            tl.store(waves + pixel[:, None] * count + feature[None, :], wave, mask=exists)
        exists = (feature < count)[:, None] & (column < H)[None, :]
        feature_weights = tl.load(embed + column[None, :] * (C + count) + C + feature[:, None], mask=exists, other=0.0)
        found += tl.dot(wave, feature_weights.to(tl.float32), input_precision="ieee")
    store_tile(table, pixel, column, found, P * P, H, True)
