"""Cost of the per-pixel Triton kernels in machine code for sm_90: registers, and instructions of the inner loops.

`python -m tests.flowseg_kernels.static.triton_budget` writes what it counts to triton_budget.json and prints the table of
docs/notes/static_counts.md (10 s). No GPU is needed.
"""

from __future__ import annotations

import json
import pathlib
import re

from ...support import aot
from . import sass
from .cuda_budget import MAX_THREADS, NOTES, REGISTERS

__all__ = ["COUNTED", "NOTES", "PATH", "VARIANTS", "compiled", "counted", "table"]

PATH = pathlib.Path(__file__).with_name("triton_budget.json")
VARIANTS = {v.name: v for v in aot.pixel_variants()}
#: Variants whose inner loop is counted: an instruction that occurs once per pixel and centroid, and one that marks the loop.
COUNTED = {
    "distance_correction C=3 neg_log fp32": ("MUFU.RCP", "MUFU.RCP"),
    "distance_correction C=3 neg_log bf16": ("MUFU.RCP", "MUFU.RCP"),
    "flow_loss C=3 velocity 0 bf16": ("MUFU.RCP", "MUFU.RCP"),
    "flow_loss C=3 endpoint 0 bf16": ("MUFU.RCP", "MUFU.RCP"),
    "nearest_centroid C=3 grid bf16": ("FSETP", "LDG.E.128"),
    "nearest_centroid C=3 grid margin bf16": ("FSETP", "LDG.E.128"),
    "nearest_centroid C=3 bf16": ("FSETP", "FSETP"),
    "nearest_centroid C=8 guesses bf16": ("FSETP", "FSETP"),
    "nearest_centroid C=16 guesses bf16": ("FSETP", "FSETP"),
}


def compiled(name: str, target: str):
    """Triton's compiled kernel of one of VARIANTS, for sm_80, ..., gfx942."""
    return aot.compiled(VARIANTS[name], target)


def _instructions_per_candidate(code, mark, loop_mark):
    """Return the instructions per `mark` in the loop with the most `loop_mark`, on its shorter and on its longer way.

    A run of centroids that contains the own class of one of the block's pixels takes the longer way. A loop without two ways
    gives the same number twice.
    """
    loop = max(sass.loops(code), key=lambda loop: sum(loop_mark in i.text for i in loop.body) - len(loop) / 1e6)
    targets = {i.target for i in code if i.target is not None}
    blocks = [[]]
    for i in loop.body:
        if i.address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(i)
        if i.opcode == "BRA":
            blocks.append([])
    marks = [sum(mark in i.text for i in block) for block in blocks]
    ways = [k for k, n in enumerate(marks) if n > max(marks) / 2]
    lengths, counts = sum(map(len, blocks)), sum(marks)
    if len(ways) == 1:
        return [lengths / counts] * 2
    return sorted((lengths - len(blocks[k])) / (counts - marks[k]) for k in ways)


def _instructions_of_guesses(code, pixels_per_thread):
    """Return the instructions per pixel before the first guess, and per guess. The loop over guesses is the first one."""
    guesses = min(sass.loops(code), key=lambda loop: loop.first)
    assert guesses.opcodes()["FMUL"] == pixels_per_thread and guesses.opcodes()["REDUX"] == 1, guesses.opcodes()
    before = sum(i.address < guesses.first for i in code)
    return {"load and find the cell": before / pixels_per_thread, "guess": len(guesses) / pixels_per_thread}


def counted(name: str) -> dict[str, float]:
    """Registers per thread, threads per program, and instructions per pixel and centroid on the shorter and the longer way."""
    kernel = compiled(name, "sm_90")
    (used,) = sass.resources(kernel.asm["cubin"]).values()
    (code,) = sass.disassemble(kernel.asm["cubin"]).values()
    shorter, longer = _instructions_per_candidate(code, *COUNTED[name])
    found = {"rivals": round(shorter, 2), "rivals and own class": round(longer, 2)}
    found = found if COUNTED[name][0] == "MUFU.RCP" else {"candidate": round(longer, 2)}
    threads = 32 * kernel.metadata.num_warps
    if "guesses" in name:
        found = {**_instructions_of_guesses(code, VARIANTS[name].constants["BLOCK"] // threads), **found}
    return {"registers": used["REG"], "threads": threads, "instructions": found}


def table(budget: dict) -> str:
    """Return the static figures of the notes, in Markdown."""
    lines = [
        "| form of the kernel | | instructions | registers | threads of a multiprocessor in use |",
        "|---|---|---|---|---|",
    ]
    for name, costs in budget["counted"].items():
        threads = costs["threads"]
        programs = REGISTERS // (-(-costs["registers"] // 8) * 8 * threads)
        share = f"{programs} programs of {threads}: {100 * programs * threads / MAX_THREADS:.0f} %"
        for i, (way, cost) in enumerate(costs["instructions"].items()):
            first = (name, costs["registers"], share) if i == 0 else ("", "", "")
            lines.append(f"| {first[0]} | {way} | {cost:g} | {first[1]} | {first[2]} |")
    return "\n".join(lines)


def main() -> None:
    budget = {"compiler": aot.compiler(), "counted": {name: counted(name) for name in COUNTED}}
    text = json.dumps(budget, indent=1)
    # Write the ways of a loop on one line.
    PATH.write_text(re.sub(r'\{\s+("[^{}]*?)\s+\}', lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n")
    print(table(budget))


if __name__ == "__main__":
    main()
