"""Every Triton kernel compiles ahead of time for every target, without spills, at the cost in triton_budget.json.

Registers are bounded by maxnreg itself: what is left to check is that nothing spills for it.

`pytest tests/flowseg_kernels/static --every-variant` compiles every variant for every target (minutes); by default all
variants are compiled for sm_90 and one of each kernel for the others.
"""

import ast
import importlib.util
import json
import pathlib
import re

import pytest

from flowseg_kernels.runtime.triton import INTERPRETED

from . import sass

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from triton.runtime import JITFunction

from flowseg_kernels.ops.neural_field import triton_kernels as field
from flowseg_kernels.ops.neural_field.triton_kernels import form

from . import triton_budget
from .triton_budget import VARIANTS, compiled

FIRST_OF_KERNEL = {v.kernel.__name__: name for name, v in reversed(VARIANTS.items())}
FIELD = {name: form(name) for name in ("forward", "states", "backward", "enter")}
TARGETS = ("sm_80", "sm_100", "sm_120", "gfx942")
BUDGET = json.loads(triton_budget.PATH.read_text())
#: For a Triton other than the one that BUDGET names: registers, and a share of the instructions.
SLACK = {"registers": 16, "instructions": 0.03}


def assert_no_spills(kernel, target):
    if target.startswith("gfx"):
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilled and all(n == "0" for n in spilled), spilled
    else:
        (used,) = sass.resources(kernel.asm["cubin"]).values()
        assert used["STACK"] == 0 and used["LOCAL"] == 0, used


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_sm_90_without_spills(name):
    assert_no_spills(compiled(name, "sm_90"), "sm_90")


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_every_target(target, request):
    names = VARIANTS if request.config.getoption("--every-variant") else FIRST_OF_KERNEL.values()
    for name in names:
        assert_no_spills(compiled(name, target), target)


@pytest.mark.parametrize("name", triton_budget.FORMS)
def test_costs_are_those_of_the_budget(name):
    found, budget = triton_budget.counted(name), BUDGET["counted"][name]
    if triton_budget.compiler() == BUDGET["compiler"]:
        assert found == budget, "run python -m tests.flowseg_kernels.static.triton_budget"
    assert found["threads"] == budget["threads"]
    assert found["registers"] <= budget["registers"] + SLACK["registers"]
    for way, cost in found["instructions"].items():
        assert cost <= budget["instructions"][way] * (1 + SLACK["instructions"]), (way, cost)


def test_the_budget_keeps_what_was_promised():
    """The inner loop of the correction in at most 14 instructions a pair, decoding in at most 12 a candidate."""
    assert list(BUDGET["counted"]) == list(triton_budget.FORMS)
    for name, costs in BUDGET["counted"].items():
        assert max(costs["instructions"].values()) <= (12 if "nearest" in name else 14), name


def test_the_notes_show_the_budget():
    assert triton_budget.table(BUDGET) in triton_budget.NOTES.read_text()


@pytest.mark.parametrize("name", [*FIRST_OF_KERNEL.values(), *FIELD])
def test_new_shapes_do_not_recompile(name):
    """Triton compiles anew when a size becomes 1 or a multiple of 16, unless told not to look at it. What is left are the few forms
    that host code chooses by shape: how planes are loaded (three), and how many tiles a program of the field takes (1, 2 or 4)."""
    variant = VARIANTS.get(name) or FIELD[name]
    kernel = variant.kernel
    sizes = [p for p in kernel.params if variant.signature[p.name] in ("i32", "i64") and not p.is_constexpr]
    assert sizes or "second stage" in name
    assert all(p.do_not_specialize for p in sizes), [p.name for p in sizes if not p.do_not_specialize]


def test_every_kernel_that_is_launched_is_compiled_ahead_of_time():
    for module in (*triton_budget.MODULES, field):
        tree = ast.parse(pathlib.Path(module.__file__).read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        launched = {
            call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)
        }
        kernels = {name for name in launched if isinstance(getattr(module, name, None), JITFunction)}
        assert kernels == {variant.kernel.__name__ for variant in module.variants()} & set(vars(module)), (
            module.__name__
        )
        assert kernels or module.__name__.endswith("decode_confusion.triton_kernels")


@pytest.mark.parametrize("name, loads", [("flow_interpolate C=3 bf16", 3), ("flow_loss_bwd C=3 bf16", 3)])
def test_whole_planes_move_16_bytes_at_a_time(name, loads):
    """Every channel, in and out: a mask or an offset whose multiple of 16 is lost makes loads of one number each."""
    (code,) = sass.disassemble(compiled(name, "sm_90").asm["cubin"]).values()
    for access in ("LDG.E.128", "STG.E.128"):
        assert sum(access in i.text for i in code) == loads
    assert not any("LDG.E.U16" in i.text or "STG.E.U16" in i.text for i in code)
