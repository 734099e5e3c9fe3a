"""A Triton kernel that keeps a GPU's fp32 pipes busy with fused multiply-adds alone."""

import triton
import triton.language as tl

#: Numbers per program: 16 independent chains per thread at four warps.
BLOCK = tl.constexpr(2048)
#: Multiply-adds per number and round.
STEPS = tl.constexpr(64)


@triton.jit
def multiply_kernel(out, factor, term, rounds):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = place.to(tl.float32)
    for _ in range(rounds):
        for _ in tl.static_range(STEPS):
            value = value * factor + term
    tl.store(out + place, value)
