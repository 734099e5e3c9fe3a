"""Predicts the time of the neural field's CUDA kernels on an H100 from their machine code for sm_90a, beside Triton's.

`python -m tests.flowseg_kernels.static.field_hopper` compiles the kernels (half a minute), writes hopper_budget.json and prints the
tables of docs/notes/static_counts.md. The sizes: bf16, Hx = 64, r = 2, p = 16, C = 3, residual, both weights normalised.

A kernel's time is the longest of four: warp instructions, matrix products, special functions (tanh), bytes of global memory. The
warp instructions are the lengths of each role's loops times their trips.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from . import field_roof, sass
from .cuda_budget import ROOT, compiler

PATH = pathlib.Path(__file__).with_name("hopper_budget.json")
SOURCE = pathlib.Path(__file__).with_name("field_kernels.cu")
#: Per nanosecond, as an H100 measured (docs/notes/h100.md): FLOP of bf16 products, bytes of a copy. And at 1.755 GHz on 132
#: multiprocessors: 4 warp instructions and 16 special functions per clock each.
PRODUCTS, BYTES = 795e3, 3020.0
ISSUED, SPECIAL = 132 * 4 * 1.755, 132 * 16 * 1.755
KERNELS = ("forward", "states", "leave", "blocks", "enter")
#: Milliseconds that an H100 measured for XL, 4,096 patches, forward and backward (the difference of both passes and the forward).
TRITON_MEASURED = (0.892, 5.63 - 0.89)
#: The same of the best standalone forward in bench/probes.
PROBE_MEASURED = 0.326
#: Loops of at most this many instructions wait for a barrier, or repeat one instruction for each thread of a warp.
_SHORT_LOOP = 12


@functools.cache
def cubin() -> tuple[pathlib.Path, str]:
    """Compile every kernel of csrc/cuda/field for sm_90a. Returns the path of the cubin and what ptxas says."""
    folder = ROOT / "build" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    target, log = folder / "field_sm_90a.cubin", folder / "field_sm_90a.log"
    headers = [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h"), SOURCE]
    if not log.exists() or log.stat().st_mtime < max(s.stat().st_mtime for s in headers):
        command = [sass.find_tool("nvcc"), "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin",
                   "-Xptxas=-v", f"-I{ROOT}/csrc", SOURCE, "-o", target]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        log.write_text(done.stdout + done.stderr)
    return target, log.read_text()


def short_name(mangled: str) -> str:
    """Kernel, operand type and options of a mangled name: "forward_blocks bf16 tanh keep", "leave fp16 4", "lengths bf16 wide".

    "wide" kernels have two halves of 64 hidden units.
    """
    kernel = re.search(
        r"\d(forward_blocks|backward_blocks|table|lengths|leave|project|enter|finish|fold)(?=[IE])", mangled
    )
    assert kernel, mangled
    options = re.search(r"INS\d*_\d+(BFloat|Half)(?:Pair)?E((?:L[bi]\d+E)*)", mangled)
    if not options:
        return kernel[1]
    flags = [name for name, on in zip(("tanh", "keep"), re.findall(r"Lb(\d)E", options[2])) if on == "1"]
    *channels, halves = re.findall(r"Li(\d+)E", options[2])
    words = [kernel[1], {"BFloat": "bf16", "Half": "fp16"}[options[1]], *flags, *channels, *["wide"] * (halves == "2")]
    return " ".join(words)


#: The kernel of field_kernels.cu whose name has the shared memory of these kernels.
_SHARED_BYTES = "shared_bytes"
_WITH_SHARED_MEMORY = ("forward_blocks", "forward_blocks keep", "backward_blocks")


@functools.cache
def resources() -> dict[str, dict[str, int]]:
    """Registers and bytes of spilled registers, by short name."""
    found = sass.resources(cubin()[0])
    return {
        short_name(name): {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}
        for name, used in sorted(found.items())
        if _SHARED_BYTES not in name
    }


def shared_memory() -> dict[str, int]:
    """Bytes of dynamic shared memory per thread block, by kernel, without the operand type."""
    (name,) = (name for name in sass.resources(cubin()[0]) if _SHARED_BYTES in name)
    kernels = [f"{kernel}{wide}" for wide in ("", " wide") for kernel in _WITH_SHARED_MEMORY]
    return dict(zip(kernels, map(int, re.findall(r"L[a-z](\d+)E", name)), strict=True))


@functools.cache
def code() -> dict[str, list[sass.Instruction]]:
    found = sass.disassemble(cubin()[0])
    return {short_name(name): body for name, body in found.items() if _SHARED_BYTES not in name}


class Role(NamedTuple):
    """Warps that run the same loops.

    granted: registers per thread that the kernel gives the role's warp group by setmaxnreg.
    is_of: whether an outermost loop belongs to the role, from the counts of its opcodes.
    trips: from depth to the trips per patch of the role's loops, outermost first, as nested in the source.
    """

    name: str
    warps: int
    granted: int
    is_of: Callable[[collections.Counter], bool]
    trips: Callable[[int], tuple[int, ...]]


_TILES = field_roof.TILES


def _has(opcode: str, count: int = 1, without: str = "HGMMA") -> Callable[[collections.Counter], bool]:
    return lambda found: found[opcode] >= count and (opcode == without or not found[without])


_LOADS = (
    Role("weights", 1, 24, _has("UTMALDG"), lambda depth: (1, depth, 1)),
    Role("gains", 1, 24, _has("F2FP"), lambda depth: (1, depth, 1)),
    Role("pixels", 2, 24, _has("LDG"), lambda depth: (1, _TILES, 0)),  # the last loop takes four channels at once
)
#: The roles of each big kernel, in the order in which a loop is looked for. The forward takes two steps per iteration.
ROLES = {
    "forward_blocks": (
        Role("consumers", 8, 224, _has("HGMMA", 32), lambda depth: (1, depth / 2)),
        Role("normaliser", 4, 40, _has("LDSM", 16), lambda depth: (1, depth, 1)),
        *_LOADS,
    ),
    "backward_blocks": (
        Role("inner groups", 8, 208, _has("HGMMA", 16), lambda depth: (depth, _TILES)),
        Role("state group", 4, 64, _has("HGMMA", 8), lambda depth: (depth * _TILES,)),
        Role("weights", 2, 32, _has("UTMALDG"), lambda depth: (depth, 2, 4, 8)),
        Role("g", 1, 32, _has("UBLKCP", 2), lambda depth: (depth * _TILES,)),
        Role("n", 1, 32, _has("UBLKCP"), lambda depth: (depth * _TILES,)),
    ),
}


#: The registers of the wide kernels.
_WIDE_REGISTERS = {
    "forward_blocks": {"consumers": 216, "normaliser": 48, "weights": 32, "gains": 32, "pixels": 32},
    "backward_blocks": {"inner groups": 184, "state group": 112},
}


def roles_of(kernel: str) -> tuple[Role, ...]:
    name, *options = kernel.split()
    if "wide" not in options:
        return ROLES[name]
    return tuple(role._replace(granted=_WIDE_REGISTERS[name].get(role.name, role.granted)) for role in ROLES[name])


def role_loops(kernel: str) -> dict[str, list[sass.Loop]]:
    """The loops of each role of a big kernel: the outermost one, then those inside it, in the order of the code.

    Code that waits longer for a barrier is at the kernel's end. Its branches back are no loops.
    """
    body = code()[kernel]
    every = sorted(sass.loops(body), key=lambda loop: (loop.first, -loop.last))
    waits = 1 + max(loop.first for loop in every if len(loop) > _SHORT_LOOP)
    waits = min(loop.first for loop in every if loop.first >= waits and len(loop) == 2)
    real = [loop for loop in every if len(loop) > _SHORT_LOOP and loop.last < waits]
    outermost = [a for a in real if not any(b is not a and b.first <= a.first and a.last <= b.last for b in real)]
    found: dict[str, list[sass.Loop]] = {}
    for role in roles_of(kernel):
        candidates = [loop for loop in outermost if role.is_of(loop.opcodes()) and loop.opcodes()["SYNCS"]]
        assert candidates, (kernel, role.name)
        outermost.remove(candidates[-1])
        found[role.name] = [
            loop for loop in real if candidates[-1].first <= loop.first and loop.last <= candidates[-1].last
        ]
    return found


def registers_of_roles(kernel: str) -> dict[str, int]:
    """Registers per thread that each role's code uses: the highest number, and one."""
    return {
        role: 1 + max(int(n) for i in loops[0].body for n in re.findall(r"\bR(\d+)\b", i.text))
        for role, loops in role_loops(kernel).items()
    }


def issued(kernel: str, depth: int) -> float:
    """Warp instructions per patch of a big kernel. Code inside a branch counts as if the branch were always taken."""
    found, total = role_loops(kernel), 0.0
    for role in roles_of(kernel):
        loops, trips = found[role.name], role.trips(depth)
        assert len(loops) == len(trips), (kernel, role.name, [len(loop) for loop in loops])
        for instruction in loops[0].body:
            times = 1.0
            for loop, count in zip(loops, trips):
                times *= count if loop.first <= instruction.address <= loop.last else 1
            total += role.warps * times
        if role.name == "consumers":
            # The step that is left over when the number of steps is odd.
            total -= role.warps * len(loops[1]) / 2
    return total


class Cost(NamedTuple):
    """Nanoseconds per patch."""

    instructions: float
    products: float
    special: float
    bytes: float


_STATE, _MATRIX, _PIXELS = field_roof._STATE, field_roof._MATRIX, field_roof._PIXELS
#: Bytes per patch that a thread block keeps of its sums, written and read once: four tiles of GroupSums, over 16 patches.
_GROUP_SUMS = 2 * 4 * _TILES * (64 * 64 + 64 * 16 + 64 + 16 * 64 + 16) / 16


def costs(name: str, depth: int) -> Cost:
    """The costs of one of KERNELS. `leave` and `enter` are bound by memory: their instructions are not counted."""
    lengths, rms = 4 * depth * (128 + 64), 4 * (depth + 1) * 256
    traffic = {
        "forward": depth * _MATRIX + 2 * _PIXELS,
        "states": depth * _MATRIX + _PIXELS + (depth + 1) * _STATE + lengths + rms,
        "leave": 2 * _STATE + _PIXELS + _GROUP_SUMS / 2,
        # The gradient of the state stays in the L2 cache from block to block.
        "blocks": 2 * depth * _MATRIX + (depth + 2) * _STATE + lengths + rms,
        "enter": _STATE + 2 * _PIXELS + _GROUP_SUMS / 2,
    }[name]
    kernel = {
        "forward": "forward_blocks bf16 tanh",
        "states": "forward_blocks bf16 tanh keep",
        "blocks": "backward_blocks bf16 tanh",
    }
    if name not in kernel:
        return Cost(0, 0, 0, traffic / BYTES)
    multiplied = 5 if name == "blocks" else 2
    tanh = depth * field_roof.PIXELS * field_roof.WIDE
    products = multiplied * depth * field_roof._PRODUCT
    return Cost(issued(kernel[name], depth) / ISSUED, products / PRODUCTS, tanh / SPECIAL, traffic / BYTES)


def predicted(depth: int) -> tuple[float, float]:
    """Return the nanoseconds per patch of forward and backward: the sum of each kernel's longest cost."""
    return max(costs("forward", depth)), sum(max(costs(name, depth)) for name in KERNELS[1:])


def predicted_of_triton(depth: int) -> tuple[float, float]:
    """The same for Triton's kernels, whose costs field_roof counts for another GPU."""
    scale = (
        field_roof.ISSUED / ISSUED,
        field_roof.PRODUCTS / PRODUCTS,
        field_roof.ISSUED / ISSUED,
        field_roof.BYTES / BYTES,
    )
    longest = {n: max(c * by for c, by in zip(field_roof.costs(n, depth, 4096), scale)) for n in field_roof.KERNELS}
    return longest.pop("forward"), sum(longest.values())


def counted() -> dict:
    """Return the content of hopper_budget.json. Costs and predictions are nanoseconds per patch."""
    opcodes = {name: collections.Counter(i.opcode for i in body) for name, body in code().items()}
    big = [name for name in code() if name.split()[0] in ROLES]
    return {
        "compiler": compiler(),
        "resources": resources(),
        "shared": shared_memory(),
        "products": {name: opcodes[name]["HGMMA"] for name in sorted(big)},
        "special": {name: opcodes[name]["MUFU"] for name in sorted(big)},
        "loops": {
            name: {role: [len(loop) for loop in loops] for role, loops in role_loops(name).items()}
            for name in sorted(big)
        },
        "costs": {
            net: {n: [round(v) for v in costs(n, depth)] for n in KERNELS} for net, depth in field_roof.DEPTHS.items()
        },
        "predicted": {net: [round(v) for v in predicted(depth)] for net, depth in field_roof.DEPTHS.items()},
        "triton": {net: [round(v) for v in predicted_of_triton(depth)] for net, depth in field_roof.DEPTHS.items()},
    }


def table(budget: dict) -> str:
    """Return the figures of the notes, in Markdown."""
    lines = [
        "| kernel, bf16, tanh | shared memory | HGMMA | MUFU | loops of each role, in instructions |",
        "|---|---|---|---|---|",
    ]
    for name, roles in budget["loops"].items():
        if "tanh" not in name or "wide" in name:
            continue
        shown = "; ".join(f"{role} {', '.join(map(str, loops))}" for role, loops in roles.items())
        shared = budget["shared"][re.sub(" (bf16|tanh)", "", name)] / 1024
        counts = f"{shared:.0f} KiB | {budget['products'][name]} | {budget['special'][name]}"
        lines.append(f"| `{name}` | {counts} | {shown} |")
    names = " | ".join((*Cost._fields, "longest"))
    lines += ["", f"| ns per patch | network | {names} |", "|---" * 7 + "|"]
    for network, kernels in budget["costs"].items():
        for name, found in kernels.items():
            cells = [str(v) if v else "" for v in found]
            lines.append(f"| {name} | {network} | {' | '.join(cells)} | {max(found)} |")
    lines += ["", "| predicted ns per patch | CUDA C++ | Triton | Triton / CUDA C++ |", "|---|---|---|---|"]
    for network, ours in budget["predicted"].items():
        for what, own, triton in zip(("forward", "backward"), ours, budget["triton"][network]):
            lines.append(f"| {network}, {what} | {own} | {triton} | {triton / own:.2f} |")
    return "\n".join(lines)


def compared_with_measured(budget: dict) -> str:
    """Return the sentences of the notes that compare bounds with times that an H100 measured."""
    (forward, backward), image = TRITON_MEASURED, 4096e-6  # patches; ns per ms
    own, triton = budget["predicted"]["XL"], budget["triton"]["XL"]
    return (
        f"Triton's backward took {backward:.1f} ms for XL at 4,096 patches on an H100, {backward / triton[1] / image:.1f} times "
        f"its bound, and its forward {forward:.2f} ms, {forward / triton[0] / image:.1f} times "
        "([measured](h100.md#what-was-changed-because-of-it)). "
        f"The standalone `wgmma` forward took {PROBE_MEASURED} ms there, {PROBE_MEASURED / own[0] / image:.1f} times the bound of "
        "this one."
    )


def main() -> None:
    budget = counted()
    text = json.dumps(budget, indent=1)
    # Write one line per kernel.
    for pattern in (r"\[\s+([^\[\]{}]*?)\s+\]", r"\{\s+(\"[^{}]*?)\s+\}"):
        text = re.sub(pattern, lambda m: m[0][0] + re.sub(r"\s*\n\s*", " ", m[1]) + m[0][-1], text)
    PATH.write_text(text + "\n")
    print(table(budget), compared_with_measured(budget), sep="\n\n")


if __name__ == "__main__":
    main()
