"""Device functions over a block of pixels that the Triton kernels of several ops share.

A block is BLOCK consecutive pixels of one image; a value with C channels is a tuple of C blocks, so that every channel stays in
its own register whatever C is. Strides are in elements; `layout` is STRIDED, PLANE or VECTOR of runtime.triton_forms.
"""

import triton
import triton.language as tl

from ..runtime import triton_forms

# A module-level value must be a constexpr for kernels to read it.
_INTERPRETED: tl.constexpr = tl.constexpr(triton_forms.INTERPRETED)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """v in another type, rounded to nearest even. The interpreter cuts fp32 down to bf16 instead of rounding it."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(v != v, 0x7FC0, bits)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(dtype)


@triton.jit
def block_of_program(pixels, blocks, layout: tl.constexpr, BLOCK: tl.constexpr):
    """Image and first pixel of this program's block, `blocks` of them an image, and which of its pixels (BLOCK,) are inside."""
    if layout == 2:
        pixels = pixels // 16 * 16  # the same number: without it the compiler must ask pixel by pixel, and load so
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return (tl.program_id(0) // blocks).to(tl.int64), start, start + tl.arange(0, BLOCK) < pixels


@triton.jit
def pixel_offsets(start, stride_h, stride_w, width, layout: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets (BLOCK,) of the pixels start, start + 1, ... within a plane."""
    i = tl.arange(0, BLOCK)
    if layout == 2:
        return tl.multiple_of(start, 16) + i
    elif layout == 1:
        return (start + i) * stride_w
    else:
        p = start + i
        return (p // width) * stride_h + (p % width) * stride_w


@triton.jit
def image_offset(image, stride, layout: tl.constexpr):
    if layout == 2:
        # The same number, in a form that keeps its multiple of 16 through all simplifications; a hint on a product with 1 is lost.
        return tl.cast(stride, tl.int64) // 16 * 16 * image
    else:
        return tl.cast(stride, tl.int64) * image


@triton.jit
def load_pixels(
    x, image, stride_b, stride_c, stride_h, stride_w, start, width, inside,
    layout: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The C channels of a block, in the type the kernel computes in; 0 outside the image."""
    at = x + image_offset(image, stride_b, layout) + pixel_offsets(start, stride_h, stride_w, width, layout, BLOCK)
    values = ()
    for c in tl.static_range(C):
        values = values + (tl.load(at + image_offset(c, stride_c, layout), mask=inside, other=0.0).to(ACC),)
    return values


@triton.jit
def store_pixels(out, values, image, start, pixels, inside, layout: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block to a contiguous (B, C, H, W). layout VECTOR promises that a plane is a multiple of 16 pixels."""
    at = start + tl.arange(0, BLOCK)
    for c in tl.static_range(C):
        tl.store(
            out + image_offset(image * C + c, pixels, layout) + at,
            rounded(values[c], out.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def load_classes(
    labels, image, stride_b, stride_h, stride_w, start, width, inside, classes, ignore_index,
    layout: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Classes (BLOCK,) int32; -1 where the label is ignored, no class at all, or outside the image."""
    at = labels + image_offset(image, stride_b, layout) + pixel_offsets(start, stride_h, stride_w, width, layout, BLOCK)
    label = tl.load(at, mask=inside, other=0)
    if label.dtype != tl.int64:
        label = label.to(tl.int32)
    valid = inside & (label >= 0) & (label < classes) & (label != ignore_index)
    return tl.where(valid, label, -1).to(tl.int32)


@triton.jit
def gather_codes(centroids, y, C: tl.constexpr):
    """The codes of classes (BLOCK,); 0 for class -1."""
    at = centroids + y.to(tl.int64) * C
    code = ()
    for c in tl.static_range(C):
        code = code + (tl.load(at + c, mask=y >= 0, other=0.0),)
    return code


@triton.jit
def zeros_like(values, C: tl.constexpr):
    out = ()
    for c in tl.static_range(C):
        out = out + (tl.zeros_like(values[c]),)
    return out


@triton.jit
def add(a, b, C: tl.constexpr):
    out = ()
    for c in tl.static_range(C):
        out = out + (a[c] + b[c],)
    return out


@triton.jit
def subtract(a, b, C: tl.constexpr):
    out = ()
    for c in tl.static_range(C):
        out = out + (a[c] - b[c],)
    return out


@triton.jit
def squared_norm(v, C: tl.constexpr):
    total = v[0] * v[0]
    for c in tl.static_range(1, C):
        total += v[c] * v[c]
    return total


@triton.jit
def load_row(at, N: tl.constexpr, FORM: tl.constexpr):
    """N neighbouring floats with as few loads as their boundary allows: for FORM "ptx" 16 bytes and whole fours, else 8 bytes if N
    is even. Triton's own loads of single numbers take 8 bytes at most."""
    row = ()
    if FORM == "ptx":
        for i in tl.static_range(N // 4):
            row = row + tl.inline_asm_elementwise(
                "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [at.to(tl.int64) + 16 * i],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
    elif N % 2 == 0 and at.dtype.element_ty == tl.float32:
        for i in tl.static_range(N // 2):
            pair = tl.load(at.to(tl.pointer_type(tl.int64)) + i)
            low, high = pair.to(tl.int32), (pair >> 32).to(tl.int32)
            row = row + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    else:
        for i in tl.static_range(N):
            row = row + (tl.load(at + i),)
    return row


@triton.jit
def load_code(centroid, j, before, C: tl.constexpr, FORM: tl.constexpr):
    """The code of centroid j after the pointer `centroid`, and the codes it was read with: as many as end at a 16-byte boundary.
    `before` are those read for j - 1."""
    TOGETHER: tl.constexpr = 1 if C % 4 == 0 else 2 if C % 2 == 0 else 4
    codes = before
    if j % TOGETHER == 0:
        codes = load_row(centroid + j * C, TOGETHER * C, FORM)
    return codes[j % TOGETHER * C : (j % TOGETHER + 1) * C], codes


@triton.jit
def difference_from(x, centroid, C: tl.constexpr):
    """x - mu for the centroid that the pointer `centroid` is at."""
    return subtract(x, load_row(centroid, C, "plain"), C)


@triton.jit
def any_nan(x, C: tl.constexpr):
    found = x[0] != x[0]
    for c in tl.static_range(1, C):
        found = found | (x[c] != x[c])
    return found


@triton.jit
def wide(high, low, ACC: tl.constexpr):
    """The number that runtime.triton_forms.two_floats split."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)
