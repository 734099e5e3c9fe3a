"""Every Triton kernel compiles ahead of time for every target, without spills, at the cost recorded in triton_budget.json.

maxnreg bounds the registers, so the tests only check that this bound causes no spills.

By default all variants are compiled for sm_90, and one variant per kernel for the other targets.
`pytest tests/flowseg_kernels/static --every-variant` compiles all variants for all targets (minutes).
"""

import ast
import importlib
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

from ...support import aot
from . import triton_budget
from .triton_budget import VARIANTS, compiled

FIRST_OF_KERNEL = {v.kernel.__name__: name for name, v in reversed(VARIANTS.items())}
FIELD = {name: aot.field_variant(name) for name in ("forward", "states", "backward", "enter")}
#: Variants of all kernels that a module launches, by module.
LAUNCHED = {f"{op}.triton_kernels": variants for op, variants in aot.PIXEL_OPS.items()}
LAUNCHED["neural_field.triton_launch"] = aot.field_variants
TARGETS = ("sm_80", "sm_100", "sm_120", "gfx942")
BUDGET = json.loads(triton_budget.PATH.read_text())
#: Tolerance for another version of Triton than the budget's: registers, and a fraction of the instructions.
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


@pytest.mark.parametrize("name", triton_budget.COUNTED)
def test_costs_are_those_of_the_budget(name):
    found, budget = triton_budget.counted(name), BUDGET["counted"][name]
    if aot.compiler() == BUDGET["compiler"]:
        assert found == budget, "run python -m tests.flowseg_kernels.static.triton_budget"
    assert found["threads"] == budget["threads"]
    assert found["registers"] <= budget["registers"] + SLACK["registers"]
    for way, cost in found["instructions"].items():
        assert cost <= budget["instructions"][way] * (1 + SLACK["instructions"]), (way, cost)


def test_the_budget_keeps_what_was_promised():
    """The correction takes at most 14 instructions per pair, decoding three channels 12 per candidate, 14 with the second nearest.

    A pixel whose first guess is proved takes fewer instructions than a search of 12 candidates.
    """
    assert list(BUDGET["counted"]) == list(triton_budget.COUNTED)
    for name, costs in BUDGET["counted"].items():
        *guesses, cost = costs["instructions"].values()
        if "guesses" in name:
            assert sum(guesses) < 12 * cost, name
        else:
            assert max(costs["instructions"].values()) <= (12 if "nearest" in name and "margin" not in name else 14), (
                name
            )


def test_the_notes_show_the_budget():
    assert triton_budget.table(BUDGET) in triton_budget.NOTES.read_text()


@pytest.mark.parametrize("name", [*FIRST_OF_KERNEL.values(), *FIELD])
def test_new_shapes_do_not_recompile(name):
    """By default Triton compiles a new variant when a size becomes 1 or a multiple of 16; do_not_specialize prevents that.

    Then only choices of the host code depend on shapes: one of three layouts of planes, 1, 2 or 4 tiles per program of the field.
    """
    variant = VARIANTS.get(name) or FIELD[name]
    kernel = variant.kernel
    sizes = [p for p in kernel.params if variant.signature[p.name] in ("i32", "i64") and not p.is_constexpr]
    assert sizes or "second stage" in name
    assert all(p.do_not_specialize for p in sizes), [p.name for p in sizes if not p.do_not_specialize]


def test_every_kernel_that_is_launched_is_compiled_ahead_of_time():
    for name, variants in LAUNCHED.items():
        module = importlib.import_module(f"flowseg_kernels.ops.{name}")
        tree = ast.parse(pathlib.Path(module.__file__).read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        launched = {
            call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)
        }
        kernels = {name for name in launched if isinstance(getattr(module, name, None), JITFunction)}
        assert kernels and kernels == {variant.kernel.__name__ for variant in variants()}, name


@pytest.mark.parametrize("name, loads", [("flow_interpolate C=3 bf16", 3), ("flow_loss_bwd C=3 bf16", 3)])
def test_whole_planes_move_16_bytes_at_a_time(name, loads):
    """Every channel is loaded and stored by 16-byte vectors.

    If the compiler does not know that a mask or an offset is a multiple of 16, it loads single numbers.
    """
    (code,) = sass.disassemble(compiled(name, "sm_90").asm["cubin"]).values()
    for access in ("LDG.E.128", "STG.E.128"):
        assert sum(access in i.text for i in code) == loads
    assert not any("LDG.E.U16" in i.text or "STG.E.U16" in i.text for i in code)
