"""Every Triton kernel compiles ahead of time for every target, without spills, within a budget of instructions.

Registers are bounded by maxnreg itself: what is left to check is that nothing spills for it.

`pytest tests/flowseg_kernels/static --every-variant` compiles every variant for every target (minutes); by default all
variants are compiled for sm_90 and one of each kernel for the others.
"""

import importlib
import importlib.util
import json
import pathlib
import re

import pytest

from flowseg_kernels.runtime.triton_forms import INTERPRETED

from . import sass

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPS = ("flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion")
VARIANTS = {
    v.name: v for op in OPS for v in importlib.import_module(f"flowseg_kernels.ops.{op}.triton_kernels").variants()
}
FIRST_OF_KERNEL = {v.kernel.__name__: name for name, v in reversed(VARIANTS.items())}
TARGETS = ("sm_80", "sm_100", "sm_120", "gfx942")
BUDGET = json.loads((pathlib.Path(__file__).parent / "triton_budget.json").read_text())


def compiled(name, target):
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


def assert_no_spills(kernel, target):
    if target.startswith("gfx"):
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilled and all(n == "0" for n in spilled), spilled
    else:
        (used,) = sass.resources(kernel.asm["cubin"]).values()
        assert used["STACK"] == 0 and used["LOCAL"] == 0, used


def instructions_a_candidate(kernel, mark, loop_mark):
    """Instructions for each `mark` (one a pixel and centroid) in the loop that has most of `loop_mark`.

    Where the loop goes one of two ways, with the search for a pixel's own class (runs of centroids that hold the class of one of
    the block's pixels) or without: those of the shorter way, and of the longer.
    """
    (code,) = sass.disassemble(kernel.asm["cubin"]).values()
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


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_sm_90_without_spills(name):
    assert_no_spills(compiled(name, "sm_90"), "sm_90")


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_every_target(target, request):
    names = VARIANTS if request.config.getoption("--every-variant") else FIRST_OF_KERNEL.values()
    for name in names:
        assert_no_spills(compiled(name, target), target)


@pytest.mark.parametrize("name", BUDGET["instructions"])
def test_inner_loop_within_its_instructions(name):
    budget = BUDGET["instructions"][name]
    shorter, longer = instructions_a_candidate(compiled(name, "sm_90"), budget["mark"], budget["loop_mark"])
    assert shorter <= budget["most"] and longer <= budget["most_with_own_class"], (shorter, longer)


@pytest.mark.parametrize("name", FIRST_OF_KERNEL.values())
def test_new_shapes_do_not_recompile(name):
    """Triton compiles anew when a size becomes 1 or a multiple of 16, unless told not to look at it."""
    kernel = VARIANTS[name].kernel
    sizes = [
        p for p in kernel.params if VARIANTS[name].signature[p.name] in ("i32", "i64", "fp32") and not p.is_constexpr
    ]
    assert sizes or "second stage" in name
    assert all(p.do_not_specialize for p in sizes), [p.name for p in sizes if not p.do_not_specialize]


@pytest.mark.parametrize("name, loads", [("flow_interpolate C=3 bf16", 3), ("flow_loss_bwd C=3 bf16", 3)])
def test_whole_planes_move_16_bytes_at_a_time(name, loads):
    """Every channel, in and out: a mask or an offset whose multiple of 16 is lost makes loads of one number each."""
    (code,) = sass.disassemble(compiled(name, "sm_90").asm["cubin"]).values()
    for access in ("LDG.E.128", "STG.E.128"):
        assert sum(access in i.text for i in code) == loads
    assert not any("LDG.E.U16" in i.text or "STG.E.U16" in i.text for i in code)
