"""A Triton kernel of fused multiply-adds only, to measure the fp32 throughput of a GPU."""

import triton
import triton.language as tl

#: Numbers per program; with four warps each thread has 16 independent chains.
BLOCK = tl.constexpr(2048)
#: Multiply-adds per number and per round.
STEPS = tl.constexpr(64)


@triton.jit
def multiply_kernel(out, factor, term, rounds):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = place.to(tl.float32)
    for _ in range(rounds):
        for _ in tl.static_range(STEPS):
            value = value * factor + term
    tl.store(out + place, value)
