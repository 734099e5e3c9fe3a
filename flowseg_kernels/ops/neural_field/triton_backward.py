"""Triton backward of the neural field. It starts from what forward_kernel stores with KEEP.

- `backward_kernel` takes a patch back through all blocks. It computes the gradients of the state and of the generated weights
  together, since they share products. If a patch is one tile, the gradient of the state stays on chip.
- `enter_kernel` takes the gradient of the state through the embedding and sums over patches.
- `finish_kernel` turns the partial sums into the gradients of the shared tensors.

No two programs add to the same memory, so every run gives the same bits.

Two gradients share one sum over pixels: with N = n(h)^T dz for a block's normalised states n(h), dW1n = gain N (the gain scales the
rows) and dgain = rowsum(N W1n). triton_forward.py explains the names.
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
    """Return u = SiLU(z) for z = 2 y, and s such that du/dy = 1 + s. With t = tanh(y), du/dy = 1 + t + u (1 - t)."""
    u, t = silu_and_tanh(y, TANH)
    return u, t + u * (1 - t)


@triton.jit
def cast_in_range(v, dtype: tl.constexpr):
    """Cast v to dtype, clamping to +-65504 for fp16.

    A column of zeros has the reciprocal norm 1e12, so its gradient overflows fp16 to inf, and inf * 0 would give NaN. A v that is
    already inf becomes NaN, so it shows in the gradients.
    """
    if dtype == tl.float16:
        v += 0.0 * v
        v = tl.maximum(v, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return rounded(v, dtype)


@triton.jit
def scaled(
    g, inverse_lengths, column, H: tl.constexpr, H_PADDED: tl.constexpr, BOTH: tl.constexpr, OPERAND: tl.constexpr
):
    """Return g divided by the column norms of W2, as an operand of products. With it no gradient needs a normalised W2."""
    if BOTH:
        g *= load_vector(inverse_lengths, column, H, H_PADDED != H)[None, :]
    return cast_in_range(g, OPERAND)


@triton.jit(do_not_specialize=["first", "depth", "sums"])
def backward_kernel(
    weights,  # (B N, L, 2 r Hx^2): W1 (Hx, r Hx), then W2 (r Hx, Hx) of each block
    gains,  # (L, Hx)
    states, later_states,  # normalised states before the blocks, see state_before
    inverse_rms,  # (n, L, p^2) fp32: 1 / rms of the states
    inverse_lengths,  # (n, L, r Hx + Hx) fp32: reciprocal column norms of the weights
    grad_weights,  # as weights
    partials,  # (B N, sums) fp32: a row of partial sums per patch, see forward_kernel
    grads,  # (n, p^2, Hx): gradient of the state, after the last block on entry and before the first on return
    scratch_sums,  # (n, 2 r Hx^2) fp32: sums over pixels, if a patch has several tiles
    # first patch of the launch, L, length of a row of `partials`
    first, depth, sums,
    H: tl.constexpr, H_PADDED: tl.constexpr, INNER: tl.constexpr, SLICE: tl.constexpr, BAND: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, BOTH: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TANH: tl.constexpr, ALIASED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the generated weights and of the state, patch by patch, and partial sums for the gains.

    The loop over a block's weights leaves sums over pixels in `scratch_sums`, or in grad_weights if the patch is one tile. A second
    loop reads them back, BAND columns of W1 and rows of W2 at a time, and adds the term that comes from the column norms.

    The kernel is one long function: g and the operands of products stay on chip across all of its steps.
    """
    TILES: tl.constexpr = (P * P + ROWS - 1) // ROWS
    MASK_SLICES: tl.constexpr = H_PADDED != H or INNER % SLICE != 0
    MASK_BANDS: tl.constexpr = H_PADDED != H or INNER % BAND != 0
    MASK_ROWS: tl.constexpr = H_PADDED != H or P * P % ROWS != 0
    local = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, H_PADDED)
    inverse_rms += local * depth * (P * P)
    inverse_lengths += local * depth * (INNER + H)
    grads += local * (P * P * H)
    scratch_sums += local * (2 * INNER * H)

    g = load_tile(grads, tl.arange(0, ROWS), column, P * P, H, MASK_ROWS).to(tl.float32)
    # The loop carries g_in: Triton keeps a loop-carried dot operand in shared memory and can read it plain and transposed. Computed
    # at the point of use it would occupy registers twice.
    g_in = scaled(g, inverse_lengths + (depth - 1) * (INNER + H) + INNER, column, H, H_PADDED, BOTH, OPERAND)
    for step in range(depth * TILES):
        level = depth - 1 - step // TILES
        tile = step % TILES
        row = tile * ROWS + tl.arange(0, ROWS)
        block_inverse_lengths = inverse_lengths + level * (INNER + H)
        at = ((first + local) * depth + level) * (2 * INNER * H)
        block = weights + at
        grad_block = grad_weights + at
        if ALIASED:
            normals = state_before(states, grad_weights, local, level, depth, at, H, INNER, P, True)
        else:
            normals = state_before(states, later_states, local, level, depth, at, H, INNER, P, False)
        if TILES > 1:
            sums_over_pixels = scratch_sums
        else:
            sums_over_pixels = grad_block
        normal = load_tile(normals, row, column, P * P, H, MASK_ROWS)
        g_normal = tl.zeros_like(g)
        if RESIDUAL:
            gain = load_vector(gains + level * H, column, H, H_PADDED != H)
            # Start the sum of products at g, in the sum's units. Then registers need not keep g as well.
            row_inverse_rms = load_vector(inverse_rms + level * (P * P), row, P * P, MASK_ROWS)
            if MASK_ROWS:
                row_inverse_rms = tl.where(row < P * P, row_inverse_rms, 1.0)
            g_normal = g * (1 / row_inverse_rms)[:, None]
            along_g = tl.sum(g_normal * normal.to(tl.float32), 1)
        normal = rounded(normal, OPERAND)
        for start in range(0, INNER, SLICE):
            inner = start + tl.arange(0, SLICE)
            # Scale the weights, not the products, by reciprocal column norms and gains: there are fewer weights. The factor 0.5
            # is there because silu_and_slope takes z / 2.
            half_inverse_length1 = 0.5 * load_vector(block_inverse_lengths, inner, INNER, INNER % SLICE != 0)[None, :]
            w1 = load_tile(block, column, inner, H, INNER, MASK_SLICES).to(tl.float32) * half_inverse_length1
            if RESIDUAL:
                w1 *= gain[:, None]
            w1 = rounded(w1, OPERAND)
            w2 = load_tile(block + H * INNER, inner, column, INNER, H, MASK_SLICES).to(OPERAND)
            y = product(normal, w1, PRECISION, UPCAST)
            g_inner = product(g_in, tl.trans(w2), PRECISION, UPCAST)
            u, slope = silu_and_slope(y, TANH)
            u = rounded(u, OPERAND)
            g_inner = cast_in_range(g_inner * slope + g_inner, OPERAND)
            g_normal += product(g_inner, tl.trans(w1), PRECISION, UPCAST)
            g_w1 = product(tl.trans(normal), g_inner, PRECISION, UPCAST)
            # Transposed, so both sums have Hx rows, enough for the widest matrix instruction.
            g_w2 = product(tl.trans(g_in), u, PRECISION, UPCAST)
            if TILES > 1:
                if tile > 0:
                    g_w1 += load_tile(sums_over_pixels, column, inner, H, INNER, MASK_SLICES)
                    g_w2 += tl.trans(load_tile(sums_over_pixels + H * INNER, inner, column, INNER, H, MASK_SLICES))
            store_tile(sums_over_pixels, column, inner, g_w1, H, INNER, MASK_SLICES)
            g_w2 = tl.trans(rounded(g_w2, sums_over_pixels.dtype.element_ty))
            store_tile(sums_over_pixels + H * INNER, inner, column, g_w2, INNER, H, MASK_SLICES)
        if tile == TILES - 1:
            # Below, threads read values that other threads of this program wrote.
            tl.debug_barrier()
            along_gain = tl.zeros((H_PADDED,), tl.float32)
            along2 = tl.zeros((H_PADDED,), tl.float32)
            for start in range(0, INNER, BAND):
                inner = start + tl.arange(0, BAND)
                inverse_length1 = load_vector(block_inverse_lengths, inner, INNER, INNER % BAND != 0)[None, :]
                w1_unit = load_tile(block, column, inner, H, INNER, MASK_BANDS).to(tl.float32) * inverse_length1
                # dz = 0.5 dy, because y = z / 2.
                g_w1 = 0.5 * load_tile(sums_over_pixels, column, inner, H, INNER, MASK_BANDS).to(tl.float32)
                if RESIDUAL:
                    along_gain += tl.sum(g_w1 * w1_unit, 1)
                    g_w1 *= gain[:, None]
                g_w1 = inverse_length1 * (g_w1 - w1_unit * tl.sum(g_w1 * w1_unit, 0)[None, :])
                store_tile(grad_block, column, inner, g_w1, H, INNER, MASK_BANDS)
                g_w2 = load_tile(sums_over_pixels + H * INNER, inner, column, INNER, H, MASK_BANDS).to(tl.float32)
                if BOTH:
                    w2_raw = load_tile(block + H * INNER, inner, column, INNER, H, MASK_BANDS).to(tl.float32)
                    along2 += tl.sum(g_w2 * w2_raw, 0)
                elif TILES > 1:
                    store_tile(grad_block + H * INNER, inner, column, g_w2, INNER, H, MASK_BANDS)
            if BOTH:
                # A column of W2 runs through all bands, so its sum is known only now.
                inverse_length2 = load_vector(block_inverse_lengths + INNER, column, H, H_PADDED != H)
                along2 *= inverse_length2 * inverse_length2
                for start in range(0, INNER, BAND):
                    inner = start + tl.arange(0, BAND)
                    g_w2 = load_tile(sums_over_pixels + H * INNER, inner, column, INNER, H, MASK_BANDS).to(tl.float32)
                    w2_raw = load_tile(block + H * INNER, inner, column, INNER, H, MASK_BANDS).to(tl.float32)
                    store_tile(
                        grad_block + H * INNER, inner, column, g_w2 - w2_raw * along2[None, :], INNER, H, MASK_BANDS
                    )
            if RESIDUAL:
                tl.store(partials + (first + local) * sums + level * H + column, along_gain, mask=column < H)
        if RESIDUAL:
            # Load the states again. Kept during the products they would take registers.
            normal = load_tile(normals, row, column, P * P, H, MASK_ROWS).to(tl.float32)
            along = (tl.sum(g_normal * normal, 1) - along_g) / H
            g = load_vector(inverse_rms + level * (P * P), row, P * P, MASK_ROWS)[:, None] * (
                g_normal - normal * along[:, None]
            )
        else:
            g = g_normal
        if TILES > 1:
            store_tile(grads, row, column, g, P * P, H, MASK_ROWS)
            tl.debug_barrier()
            row = ((step + 1) % TILES) * ROWS + tl.arange(0, ROWS)
            g = load_tile(grads, row, column, P * P, H, MASK_ROWS)
        elif ALIASED:
            # The next block's gradients overwrite a state that other threads may still be reading.
            tl.debug_barrier()
        next_level = tl.maximum(depth - 1 - (step + 1) // TILES, 0)
        g_in = scaled(g, inverse_lengths + next_level * (INNER + H) + INNER, column, H, H_PADDED, BOTH, OPERAND)
    if TILES == 1:
        store_tile(grads, tl.arange(0, ROWS), column, g, P * P, H, MASK_ROWS)


@triton.jit(
    do_not_specialize=[
        "first", "columns", "per_image", "features", "sb", "sc", "sh", "sw", "patches", "groups_before", "patches_per_group"
    ]
)  # fmt: skip
def enter_kernel(
    x,  # (B, C, H, W)
    embed,  # (Hx, C + F^2)
    grads,  # (n, p^2, Hx): gradient of the state before the first block
    grad_x,  # (B, C, H, W), contiguous
    partials,  # (groups, p^2 Hx + TILES Hx C) fp32, a row of partial sums per group of patches
    # first patch of the round, patches per row of an image and per image, C + F^2
    first, columns, per_image, features,
    # strides of x
    sb: tl.int64, sc: tl.int64, sh: tl.int64, sw: tl.int64,
    # patches of the round, groups of earlier rounds
    patches, groups_before, patches_per_group,
    H: tl.constexpr, H_PADDED: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    C_PADDED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x from `grads`, the gradient of the embedding's result, and sum over groups of patches.

    A program takes the same pixels of all patches of a group in turn. The group's row of `partials` has the sum of `grads` over its
    patches (p^2, Hx), then per tile the gradient of the embedding's weights on the channels (Hx, C).
    """
    TILES: tl.constexpr = (P * P + ROWS - 1) // ROWS
    MASK_ROWS: tl.constexpr = H_PADDED != H or P * P % ROWS != 0
    group = tl.program_id(0) // TILES
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, H_PADDED)
    channel = tl.arange(0, C_PADDED)
    from_embed = tl.trans(load_embedding(embed, column, channel, features, H, C).to(OPERAND))
    by_position = tl.zeros((ROWS, H_PADDED), tl.float32)
    by_pixel = tl.zeros((H_PADDED, C_PADDED), tl.float32)
    for local in range(group * patches_per_group, tl.minimum((group + 1) * patches_per_group, patches)):
        g = load_tile(grads + tl.cast(local, tl.int64) * (P * P * H), row, column, P * P, H, MASK_ROWS)
        by_position += g.to(tl.float32)
        g_in = rounded(g, OPERAND)
        patch = first + local
        at, exists = image_places(patch, row, channel, columns, per_image, sb, sc, sh, sw, P, C)
        pixels = tl.load(x + at, mask=exists, other=0.0).to(OPERAND)
        by_pixel += product(tl.trans(g_in), pixels, PRECISION, UPCAST)
        at, exists = dense_places(patch, row, channel, columns, per_image, P, C)
        g_x = rounded(product(g_in, from_embed, PRECISION, UPCAST), grad_x.dtype.element_ty)
        tl.store(grad_x + at, g_x, mask=exists)
    group_sums = partials + (groups_before + group).to(tl.int64) * (P * P * H + TILES * (H * C))
    store_tile(group_sums, row, column, by_position, P * P, H, MASK_ROWS)
    group_sums += P * P * H + (tl.program_id(0) % TILES) * (H * C)
    store_tile(group_sums, column, channel, by_pixel, H, C, True)


@triton.jit(do_not_specialize=["freqs", "depth"])
def finish_kernel(
    by_patch,  # row of forward_kernel's and backward_kernel's partial sums, summed over patches, fp32
    by_group,  # row of enter_kernel's partial sums, summed over groups, fp32
    waves,  # (p^2, F^2) fp32
    grad_embed,  # (Hx, C + F^2)
    grad_bias,  # (Hx,)
    grad_gains,  # (L, Hx)
    grad_out_gain,  # (Hx,)
    grad_out_weight,  # (C, Hx)
    grad_out_bias,  # (C,)
    freqs, depth,
    H: tl.constexpr, P: tl.constexpr, C: tl.constexpr, C_PADDED: tl.constexpr,
    FORWARD_TILES: tl.constexpr, ENTER_TILES: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the shared tensors. A program takes one of the Hx hidden units.

    FORWARD_TILES, ENTER_TILES: tiles per patch in forward_kernel and in enter_kernel.

    Sums over pixels use fp64: the feature of frequency 0 is 1 everywhere, and its fp32 sum over pixels had up to 2.2 times
    PyTorch's error.
    """
    unit = tl.program_id(0)
    channel = tl.arange(0, C_PADDED)
    count = freqs * freqs
    embed = grad_embed + unit * (C + count)
    for start in range(0, count, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        found = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, P * P, BLOCK):
            pixel = first + tl.arange(0, BLOCK)
            g = tl.load(by_group + pixel * H + unit, mask=pixel < P * P, other=0.0).to(tl.float64)
            exists = (pixel < P * P)[:, None] & (feature < count)[None, :]
            wave = tl.load(waves + pixel[:, None] * count + feature[None, :], mask=exists, other=0.0)
            found += tl.sum(g[:, None] * wave.to(tl.float64), 0)
        found = rounded(found.to(tl.float32), grad_embed.dtype.element_ty)
        tl.store(embed + C + feature, found, mask=feature < count)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, P * P, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        total += tl.load(by_group + pixel * H + unit, mask=pixel < P * P, other=0.0).to(tl.float64)
    tl.store(grad_bias + unit, rounded(tl.sum(total, 0).to(tl.float32), grad_bias.dtype.element_ty))

    by_pixel = tl.zeros((C_PADDED,), tl.float32)
    for tile in range(ENTER_TILES):
        by_pixel += load_vector(by_group + P * P * H + tile * (H * C) + unit * C, channel, C, True)
    tl.store(embed + channel, rounded(by_pixel, grad_embed.dtype.element_ty), mask=channel < C)

    by_gain = 0.0
    by_weight = tl.zeros((C_PADDED,), tl.float32)
    by_bias = tl.zeros((C_PADDED,), tl.float32)
    for tile in range(FORWARD_TILES):
        tile_sums = by_patch + depth * H + tile * ((1 + C) * H + C)
        if RESIDUAL:
            by_gain += tl.load(tile_sums + unit)
        by_weight += tl.load(tile_sums + H + channel * H + unit, mask=channel < C, other=0.0)
        by_bias += load_vector(tile_sums + (1 + C) * H, channel, C, True)
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
