"""What the per-pixel Triton kernels cost by the machine code for sm_90: registers, and instructions of the inner loops.

`python -m tests.flowseg_kernels.static.triton_budget` writes what it counts to triton_budget.json and prints the table of
docs/notes/static_counts.md (10 s). No GPU is needed.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import re

from . import sass
from .cuda_budget import MOST_THREADS, NOTES, REGISTERS

__all__ = ["FORMS", "NOTES", "PATH", "VARIANTS", "compiled", "compiler", "counted", "table"]

PATH = pathlib.Path(__file__).with_name("triton_budget.json")
OPS = ("flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion")
MODULES = [importlib.import_module(f"flowseg_kernels.ops.{op}.triton_kernels") for op in OPS]
VARIANTS = {v.name: v for module in MODULES for v in module.variants()}
#: Of the forms that are counted: what there is one of for each pixel and centroid, and what the loop has most of.
FORMS = {
    "distance_correction C=3 neg_log fp32": ("MUFU.RCP", "MUFU.RCP"),
    "distance_correction C=3 neg_log bf16": ("MUFU.RCP", "MUFU.RCP"),
    "flow_loss C=3 velocity 0 bf16": ("MUFU.RCP", "MUFU.RCP"),
    "flow_loss C=3 endpoint 0 bf16": ("MUFU.RCP", "MUFU.RCP"),
    "nearest_centroid C=3 grid bf16": ("FSETP", "LDG.E.128"),
    "nearest_centroid C=3 bf16": ("FSETP", "FSETP"),
}


def compiler() -> str:
    """Such as "triton 3.9.0"."""
    return f"triton {importlib.import_module('triton').__version__}"


def compiled(name: str, target: str):
    """Triton's kernel of a form for sm_80, ..., gfx942."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    v = VARIANTS[name]
    # Pointers are declared aligned, as tensors are: a launch compiles that form.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(v.signature.values()) if kind[0] == "*"}
    constants, options = dict(v.constants), dict(v.options)
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
        constants = {k: "gcn" if value == "ptx" else value for k, value in constants.items()}
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    if target in ("sm_100", "gfx942"):  # as compile_options has it
        options.pop("maxnreg", None)
    return compile_kernel(ASTSource(v.kernel, v.signature, constants, aligned), target=gpu, options=options)


def _instructions_a_candidate(code, mark, loop_mark):
    """Instructions for each `mark` in the loop that has most of `loop_mark`.

    Where the loop goes one of two ways, with the search for a pixel's own class (runs of centroids that hold the class of one of
    the block's pixels) or without: those of the shorter way, and of the longer.
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


def counted(name: str) -> dict[str, float]:
    """Registers and threads of a program of one of FORMS, and instructions a pixel and centroid, of the shorter and longer way."""
    kernel = compiled(name, "sm_90")
    (used,) = sass.resources(kernel.asm["cubin"]).values()
    (code,) = sass.disassemble(kernel.asm["cubin"]).values()
    shorter, longer = _instructions_a_candidate(code, *FORMS[name])
    found = {"rivals": round(shorter, 2), "rivals and own class": round(longer, 2)}
    found = found if FORMS[name][0] == "MUFU.RCP" else {"candidate": round(longer, 2)}
    return {"registers": used["REG"], "threads": 32 * kernel.metadata.num_warps, "instructions": found}


def table(budget: dict) -> str:
    """The static figures of the notes, in Markdown."""
    lines = [
        "| form of the kernel | | instructions | registers | threads of a multiprocessor in use |",
        "|---|---|---|---|---|",
    ]
    for name, costs in budget["counted"].items():
        threads = costs["threads"]
        programs = REGISTERS // (-(-costs["registers"] // 8) * 8 * threads)
        share = f"{programs} programs of {threads}: {100 * programs * threads / MOST_THREADS:.0f} %"
        for i, (way, cost) in enumerate(costs["instructions"].items()):
            first = (name, costs["registers"], share) if i == 0 else ("", "", "")
            lines.append(f"| {first[0]} | {way} | {cost:g} | {first[1]} | {first[2]} |")
    return "\n".join(lines)


def main() -> None:
    budget = {"compiler": compiler(), "counted": {name: counted(name) for name in FORMS}}
    text = json.dumps(budget, indent=1)
    # The ways of a loop on one line.
    PATH.write_text(re.sub(r'\{\s+("[^{}]*?)\s+\}', lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n")
    print(table(budget))


if __name__ == "__main__":
    main()
