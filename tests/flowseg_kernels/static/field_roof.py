"""Predicts the neural field's Triton kernels on an H200 from their machine code, beside the roofs. No GPU confirms it.

`python -m tests.flowseg_kernels.static.field_roof` prints the tables of docs/notes/performance.md: bf16, Hx = 64, r = 2, p = 16,
C = 3. Loops' lengths times their trips give the warp instructions; a kernel takes as long as the longest of instructions, products,
operands of products in shared memory, and bytes.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowseg_kernels.ops.neural_field.triton_kernels import form, patches_at_once

from . import sass

#: Of an H200: floating-point operations of bf16 products, bytes and warp instructions in a nanosecond; four warp instructions
#: take a clock of a multiprocessor, which reads 128 bytes of its shared memory.
PRODUCTS, BYTES, ISSUED = 790e3, 4300.0, 1030.0
SHARED = ISSUED / 4 * 128
HIDDEN, WIDE, PIXELS, CHANNELS, TILES = 64, 128, 256, 3, 4
KERNELS = ("forward", "states", "backward", "enter")
DEPTHS = {"L": 2, "XL": 4}
_PRODUCT = 2 * PIXELS * HIDDEN * WIDE
_MATRIX = 2 * HIDDEN * WIDE * 2  # bytes of one block's weights
_STATE = PIXELS * HIDDEN * 2
_PIXELS = PIXELS * CHANNELS * 2


def compiled(variant, target):
    """A form of a kernel for "sm_90", "gfx942" and so on. Pointers are declared aligned, as tensors are."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(variant.signature.values()) if kind[0] == "*"}
    constants, options = dict(variant.constants), dict(variant.options)
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
        if "TANH" in constants:  # NVIDIA's instruction
            constants["TANH"] = False
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return compile_kernel(ASTSource(variant.kernel, variant.signature, constants, aligned), target=gpu, options=options)


class Cost(NamedTuple):
    """Nanoseconds a patch."""

    instructions: float
    products: float
    operands: float
    bytes: float


def trips(name: str, constants: dict, depth: int) -> list[int]:
    """How often each loop of a kernel runs, in the order of the code."""
    if name == "enter":
        return [constants["TOGETHER"]]
    slices = WIDE // constants["SLICE"]
    if name == "backward":
        return [depth, slices, WIDE // constants["BAND"]]  # of two loops over bands one is unrolled
    return [depth, constants["TOGETHER"], depth, slices]


def operand_bytes(product: sass.Instruction) -> int:
    """What a warp-group product reads of shared memory: (64, 16) unless that is in registers, and (16, N), of 16 bits."""
    wide, both = re.search(r"64x(\d+)x16\S* R\d+, (gdesc)?", product.text).groups()
    return 2 * 16 * (int(wide) + (64 if both else 0))


def warp_totals(code: list[sass.Instruction], counts: list[int]) -> tuple[int, int]:
    """Instructions that one warp of a program issues, and bytes of shared memory that products read for a warp group; code
    that is branched around counts once."""
    loops = sorted(sass.loops(code), key=lambda loop: (loop.first, -loop.last))
    assert len(loops) == len(counts), "a loop was unrolled or split: the trips no longer describe this code"
    times = [math.prod(n for n, loop in zip(counts, loops) if loop.first <= i.address <= loop.last) for i in code]
    return sum(times), sum(n * operand_bytes(i) for n, i in zip(times, code) if i.opcode == "HGMMA")


def costs(name: str, depth: int, patches: int) -> Cost:
    variant = form(name, patches=patches)
    (code,) = sass.disassemble(compiled(variant, "sm_90").asm["cubin"]).values()
    programs = 1 if name == "backward" else TILES / variant.constants["TOGETHER"]
    warps = programs * variant.options["num_warps"]
    issued, read = warp_totals(code, trips(name, variant.constants, depth))
    products = {"forward": 2, "states": 2, "backward": 5, "enter": 0}[name] * depth
    states = depth * (_STATE + PIXELS * 4)
    traffic = {
        "forward": depth * _MATRIX + 2 * _PIXELS,
        "states": depth * _MATRIX + 2 * _PIXELS + states + _STATE,
        "backward": 2 * depth * _MATRIX + states + 2 * _STATE,
        # A program of `enter` leaves the sum over its patches in fp32, which is read once more.
        "enter": _STATE + 2 * _PIXELS + 4 * _STATE / variant.constants.get("TOGETHER", 1),
    }[name]
    return Cost(warps * issued / ISSUED, products * _PRODUCT / PRODUCTS, warps / 4 * read / SHARED, traffic / BYTES)


def roofs(depth: int) -> tuple[float, float]:
    """Forward's and backward's longer one of needed products (2; 7 with recomputation) and needed bytes, in nanoseconds a patch."""
    return (
        max(2 * depth * _PRODUCT / PRODUCTS, (depth * _MATRIX + 2 * _PIXELS) / BYTES),
        max(7 * depth * _PRODUCT / PRODUCTS, (2 * depth * _MATRIX + 3 * _PIXELS) / BYTES),
    )


def shares(patches: int = 1024) -> dict[str, tuple[float, float]]:
    """By network, forward's and backward's part of the roof."""
    found = collections.defaultdict(tuple)
    for network, depth in DEPTHS.items():
        for roof, names in zip(roofs(depth), (KERNELS[:1], KERNELS[1:])):
            found[network] += (roof / sum(max(costs(name, depth, patches)) for name in names),)
    return dict(found)


def main() -> None:
    for name in KERNELS:
        variant = form(name)
        kernel = compiled(variant, "sm_90")
        (code,) = sass.disassemble(kernel.asm["cubin"]).values()
        (used,) = sass.resources(kernel.asm["cubin"]).values()
        inner = min(len(loop) for loop in sass.innermost_loops(code) if "HGMMA" in loop.opcodes())
        opcodes = collections.Counter(i.opcode for i in code)
        chosen = (
            f"{variant.constants['ROWS']} x {variant.constants.get('SLICE', HIDDEN)}, {variant.options['num_warps']}"
        )
        shared = kernel.metadata.shared / 1024
        print(
            f"{name} | {chosen} | {used['REG']} | {shared:.0f} KiB | {opcodes['HGMMA']} HGMMA, {opcodes['HMMA']} HMMA | {inner}"
        )
    for patches in (256, 1024):
        for network, depth in DEPTHS.items():
            print(f"{network}, {patches} patches (rounds of {patches_at_once(patches)}), ns a patch")
            for name in KERNELS:
                cost = costs(name, depth, patches)
                print(
                    f"  {name:8s}",
                    *(f"{field} {value:.0f}," for field, value in cost._asdict().items()),
                    f"longest {max(cost):.0f}",
                )
        for network, found in shares(patches).items():
            for way, share, roof in zip(("forward", "backward"), found, roofs(DEPTHS[network])):
                print(
                    f"{network} {way}: {roof / share * patches / 1e3:.0f} us, roof {roof * patches / 1e3:.0f}, {share:.1%}"
                )


if __name__ == "__main__":
    main()
