"""Device functions over a block of pixels, shared by the Triton kernels of the per-pixel ops.

A block is BLOCK consecutive pixels of one image. A value with C channels is a tuple of C blocks, so every channel has its own
registers for any C. Strides are in elements. `layout` is STRIDED, PLANE or VECTOR (0, 1, 2) of runtime/triton.py; ASSEMBLY is the
inline assembly that may be used, as its `assembly_for` returns it.
"""

import triton
import triton.language as tl

from ..runtime import triton as availability

# Kernels can only read a module-level value that is a constexpr.
INTERPRETED: tl.constexpr = tl.constexpr(availability.INTERPRETED)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """Cast v, rounding to nearest even. The interpreter truncates fp32 to bf16, so there the rounding is written out."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(v != v, 0x7FC0, bits)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(dtype)


@triton.jit
def block_of_program(pixels, blocks, layout: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's image, the first pixel of its block, and a mask (BLOCK,) of the pixels inside the image.

    pixels, blocks: numbers of pixels and blocks per image.
    """
    if layout == 2:
        # The value does not change. It tells the compiler that the mask is constant over 16 pixels, so it can use vector loads.
        pixels = pixels // 16 * 16
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return (tl.program_id(0) // blocks).to(tl.int64), start, start + tl.arange(0, BLOCK) < pixels


@triton.jit
def pixel_offsets(start, stride_h, stride_w, width, layout: tl.constexpr, BLOCK: tl.constexpr):
    """Return the offsets (BLOCK,) of the pixels start, start + 1, ... within a plane."""
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
        # The value does not change. Written so, "multiple of 16" survives all simplifications; a hint on a product with 1 is lost.
        return tl.cast(stride, tl.int64) // 16 * 16 * image
    else:
        return tl.cast(stride, tl.int64) * image


@triton.jit
def load_pixels(
    x, image, stride_b, stride_c, stride_h, stride_w, start, width, inside,
    layout: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the C channels of a block of x (B, C, H, W), cast to the dtype ACC that the kernel computes in; 0 outside the image."""
    at = x + image_offset(image, stride_b, layout) + pixel_offsets(start, stride_h, stride_w, width, layout, BLOCK)
    values = ()
    for c in tl.static_range(C):
        values = values + (tl.load(at + image_offset(c, stride_c, layout), mask=inside, other=0.0).to(ACC),)
    return values


@triton.jit
def store_pixels(out, values, image, start, pixels, inside, layout: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Store a block in a contiguous out (B, C, H, W). Layout VECTOR promises that `pixels` per plane is a multiple of 16."""
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
    """Load the classes (BLOCK,) int32 of a block of labels (B, H, W).

    The class is -1 where the label is ignored or out of range, and outside the image.
    """
    at = labels + image_offset(image, stride_b, layout) + pixel_offsets(start, stride_h, stride_w, width, layout, BLOCK)
    label = tl.load(at, mask=inside, other=0)
    if label.dtype != tl.int64:
        label = label.to(tl.int32)
    valid = inside & (label >= 0) & (label < classes) & (label != ignore_index)
    return tl.where(valid, label, -1).to(tl.int32)


@triton.jit
def gather_codes(centroids, y, C: tl.constexpr):
    """Load the codes of classes y (BLOCK,) from centroids (K, C); 0 for class -1."""
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
def load_row(at, N: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Load N consecutive floats with the widest loads that their alignment permits.

    Rows follow each other, so they are aligned to 16 bytes if N is a multiple of 4, and to 8 bytes if N is even. ASSEMBLY "ptx" can
    load all 16 bytes at once; Triton alone never emits a load of more than 8 bytes here. Triton takes seconds to compile tens of
    its own loads.
    """
    row = ()
    if ASSEMBLY == "ptx" and N % 4 == 0:
        for i in tl.static_range(N // 4):
            row = row + tl.inline_asm_elementwise(
                "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [at.to(tl.int64) + 16 * i],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
    elif ASSEMBLY == "ptx" and N % 2 == 0:
        for i in tl.static_range(N // 2):
            row = row + tl.inline_asm_elementwise(
                "ld.global.nc.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [at.to(tl.int64) + 8 * i],
                dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
    elif ASSEMBLY == "ptx":
        for i in tl.static_range(N):
            value = tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=f,l", [at.to(tl.int64) + 4 * i], dtype=tl.float32, is_pure=False, pack=1
            )
            row = row + (value,)
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
def load_code(centroid, j, previous, C: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the code of the j-th centroid after the pointer `centroid`, and all codes that the same wide load returned.

    A load covers as many codes as end at a 16-byte boundary. `previous` are the codes that the call for j - 1 returned.
    """
    CODES_PER_LOAD: tl.constexpr = 1 if C % 4 == 0 else 2 if C % 2 == 0 else 4
    codes = previous
    if j % CODES_PER_LOAD == 0:
        codes = load_row(centroid + j * C, CODES_PER_LOAD * C, ASSEMBLY)
    return codes[j % CODES_PER_LOAD * C : (j % CODES_PER_LOAD + 1) * C], codes


@triton.jit
def difference_from(x, centroid, C: tl.constexpr):
    """Return x - mu for the centroid mu that the pointer `centroid` points to."""
    return subtract(x, load_row(centroid, C, "plain"), C)


@triton.jit
def any_nan(x, C: tl.constexpr):
    found = x[0] != x[0]
    for c in tl.static_range(1, C):
        found = found | (x[c] != x[c])
    return found


@triton.jit
def combined(high, low, ACC: tl.constexpr):
    """Return the number that `two_floats` of runtime/triton.py split."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)
