"""Predicts the time of the neural field's Triton kernels on an H200 from their machine code, with their roofs.

`python -m tests.flowseg_kernels.static.field_roof` writes the results to field_budget.json and prints the tables of
docs/notes/static_counts.md (a minute). The sizes: bf16, Hx = 64, r = 2, p = 16, C = 3.

Lengths of loops times their trip counts give the warp instructions. A kernel's time is the longest of four: warp instructions,
matrix products, reads of their operands from shared memory, and bytes of global memory. Measurements on an H100 refuted these
predictions: the kernels take three to five times as long (docs/notes/h100.md).
"""

from __future__ import annotations

import collections
import functools
import json
import math
import pathlib
import re
from typing import NamedTuple

import triton

from bench.field_plain import products
from flowseg_kernels.ops.neural_field.triton_settings import patches_per_group

from ...support.aot import compiled, field_variant
from . import sass
from .cuda_budget import REGISTERS

PATH = pathlib.Path(__file__).with_name("field_budget.json")
#: Throughput of an H200 per nanosecond: floating-point operations of bf16 products, bytes of global memory, warp instructions.
#: A multiprocessor issues four warp instructions per clock and reads 128 bytes of shared memory.
PRODUCTS, BYTES, ISSUED = 790e3, 4300.0, 1030.0
SHARED = ISSUED / 4 * 128
HIDDEN, WIDE, PIXELS, CHANNELS, TILES = 64, 128, 256, 3, 4
KERNELS = ("forward", "states", "backward", "enter")
DEPTHS = {"L": 2, "XL": 4}
_PRODUCT = 2 * PIXELS * HIDDEN * WIDE
_MATRIX = 2 * HIDDEN * WIDE * 2  # bytes of one block's weights
_STATE = PIXELS * HIDDEN * 2
_PIXELS = PIXELS * CHANNELS * 2


@functools.cache
def machine_code(name: str, patches: int = 1024):
    """Return a kernel's variant, its compiled kernel for sm_90 and its instructions."""
    variant = field_variant(name, patches=patches)
    kernel = compiled(variant, "sm_90")
    (code,) = sass.disassemble(kernel.asm["cubin"]).values()
    return variant, kernel, code


class Cost(NamedTuple):
    """Nanoseconds per patch."""

    instructions: float
    products: float
    operands: float
    bytes: float


def trips(name: str, constants: dict, depth: int, patches: int) -> list[int]:
    """Return the trip count of each loop of a kernel, in the order of the code."""
    if name == "enter":
        return [patches_per_group(patches)]
    slices = WIDE // constants["SLICE"]
    if name == "backward":
        return [depth, slices, WIDE // constants["BAND"]]  # one of the two loops over bands is unrolled
    return [depth, constants["TILES_PER_PROGRAM"], depth, slices]


def operand_bytes(product: sass.Instruction) -> int:
    """Return the bytes that a warp-group product reads from shared memory: a 16-bit (16, N), and a (64, 16) if not in registers."""
    columns, both = re.search(r"64x(\d+)x16\S* R\d+, (gdesc)?", product.text).groups()
    return 2 * 16 * (int(columns) + (64 if both else 0))


def warp_totals(code: list[sass.Instruction], counts: list[int]) -> tuple[int, int]:
    """Return the instructions that a warp issues, and the bytes of shared memory that products read for a warp group.

    Code inside a branch counts as if the branch were always taken.
    """
    loops = sorted(sass.loops(code), key=lambda loop: (loop.first, -loop.last))
    assert len(loops) == len(counts), "a loop was unrolled or split: the trips no longer describe this code"
    times = [math.prod(n for n, loop in zip(counts, loops) if loop.first <= i.address <= loop.last) for i in code]
    return sum(times), sum(n * operand_bytes(i) for n, i in zip(times, code) if i.opcode == "HGMMA")


def costs(name: str, depth: int, patches: int) -> Cost:
    variant, _, code = machine_code(name, patches)
    together = patches_per_group(patches) if name == "enter" else variant.constants.get("TILES_PER_PROGRAM", TILES)
    programs = TILES / together
    warps = programs * variant.options["num_warps"]
    issued, read = warp_totals(code, trips(name, variant.constants, depth, patches))
    multiplied = {"forward": 2, "states": 2, "backward": 5, "enter": 0}[name] * depth
    states = depth * (_STATE + PIXELS * 4)
    traffic = {
        "forward": depth * _MATRIX + 2 * _PIXELS,
        "states": depth * _MATRIX + 2 * _PIXELS + states + _STATE,
        "backward": 2 * depth * _MATRIX + states + 2 * _STATE,
        # A program of `enter` writes the fp32 sum over its patches, which is read once.
        "enter": _STATE + 2 * _PIXELS + 4 * _STATE / together,
    }[name]
    return Cost(warps * issued / ISSUED, multiplied * _PRODUCT / PRODUCTS, warps / 4 * read / SHARED, traffic / BYTES)


def roofs(depth: int, backward: int = products("backward", "cuda")) -> tuple[float, float]:
    """Return the roofs of forward and backward in nanoseconds per patch: the longer of necessary products and necessary bytes."""
    return (
        max(products("forward", "cuda") * depth * _PRODUCT / PRODUCTS, (depth * _MATRIX + 2 * _PIXELS) / BYTES),
        max(backward * depth * _PRODUCT / PRODUCTS, (2 * depth * _MATRIX + 3 * _PIXELS) / BYTES),
    )


def predicted(depth: int, patches: int) -> tuple[float, float]:
    """Return the nanoseconds per patch of forward and backward: the sum of each kernel's longest cost."""
    return tuple(sum(max(costs(name, depth, patches)) for name in names) for names in (KERNELS[:1], KERNELS[1:]))


def resources(name: str) -> dict[str, int | None]:
    _, kernel, code = machine_code(name)
    (used,) = sass.resources(kernel.asm["cubin"]).values()
    granted = -(-used["REG"] // 8) * 8 * 32 * kernel.metadata.num_warps
    opcodes = collections.Counter(i.opcode for i in code)
    return {
        "spilled": used["STACK"] + used["LOCAL"],
        "registers": used["REG"],
        "shared": kernel.metadata.shared,
        "programs": min(REGISTERS // granted, 227 * 1024 // (kernel.metadata.shared + 1024)),
        "HGMMA": opcodes["HGMMA"],
        "HMMA": opcodes["HMMA"],
        "loop": min(len(loop) for loop in sass.innermost_loops(code) if "HGMMA" in loop.opcodes()),
    }


def counted() -> dict:
    """Return the content of field_budget.json. Costs are nanoseconds per patch of 1,024, predictions microseconds per image."""
    networks = [(network, depth, patches) for network, depth in DEPTHS.items() for patches in (256, 1024)]
    return {
        "compiler": f"Triton {triton.__version__}",
        "resources": {name: resources(name) for name in KERNELS},
        "costs": {
            network: {name: [round(v) for v in costs(name, depth, 1024)] for name in KERNELS}
            for network, depth in DEPTHS.items()
        },
        "predicted": {
            f"{network}, {patches} patches": [round(v * patches / 1e3) for v in predicted(depth, patches)]
            for network, depth, patches in networks
        },
        "roofs": {
            f"{network}, {patches} patches": [round(v * patches / 1e3) for v in roofs(depth)]
            for network, depth, patches in networks
        },
        # The third share is that of a backward which keeps z on chip and so computes it once.
        "shares": {
            f"{network}, {patches} patches": [
                round(100 * roof / time)
                for roof, time in zip(
                    (*roofs(depth), roofs(depth, products("backward", "cpu"))[1]),
                    (*predicted(depth, patches), predicted(depth, patches)[1]),
                )
            ]
            for network, depth, patches in networks
        },
    }


def table(budget: dict) -> str:
    """Return the figures of the notes, in Markdown."""
    lines = [
        "| kernel | pixels x slice, warps | registers | shared | programs of an SM | products | innermost loop with products |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in budget["resources"].items():
        variant = field_variant(name)
        step = " x ".join(str(variant.constants[k]) for k in ("ROWS", "SLICE") if k in variant.constants)
        step += f", {variant.options['num_warps']}"
        lines.append(
            f"| {name} | {step} | {found['registers']} | {found['shared'] / 1024:.0f} KiB | {found['programs']} "
            f"| {found['HGMMA']} HGMMA, {found['HMMA']} HMMA | {found['loop']} |"
        )
    names = " | ".join((*Cost._fields, "longest"))
    lines += ["", f"| ns per patch | network | {names} |", "|---" * 7 + "|"]
    for network, kernels in budget["costs"].items():
        for name, found in kernels.items():
            lines.append(f"| {name} | {network} | {' | '.join(map(str, (*found, max(found))))} |")
    lines += [
        "",
        "| predicted us per image | forward | its roof | share | backward | its roof | share | share of 6 products |",
        "|---" * 8 + "|",
    ]
    for image, (forward, backward) in budget["predicted"].items():
        (above, back_above), shares = budget["roofs"][image], budget["shares"][image]
        lines.append(
            f"| {image} | {forward} | {above} | {shares[0]} % | {backward} | {back_above} | {shares[1]} % | {shares[2]} % |"
        )
    return "\n".join(lines)


def main() -> None:
    budget = counted()
    text = json.dumps(budget, indent=1)
    # Write one line per kernel.
    PATH.write_text(
        re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text) + "\n"
    )
    print(table(budget))


if __name__ == "__main__":
    main()
