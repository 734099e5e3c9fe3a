"""The neural field's CUDA kernels for Hopper stay within hopper_budget.json: no spills, no serialised products, loops, predictions.

The numbers are exact for the nvcc that the file names; another version may exceed them by a few percent.
"""

import importlib.util
import json
import re

import pytest

from ...conftest import proof
from . import sass
from .cuda_budget import NOTES, compiler

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: no prediction to compare with", allow_module_level=True)

import triton

from . import field_hopper, field_roof

BUDGET = json.loads(field_hopper.PATH.read_text())
#: For other versions of nvcc than the budget's.
LONGER, MORE_REGISTERS = 1.05, 8
#: ptxas says that it has serialised warp-group products, with one of these numbers.
SERIALISED = re.compile(r"C75\d\d|serializ", re.IGNORECASE)


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    proof("cuda_code", None if sass.find_tool("nvcc") else "nvcc was not found: no machine code to look at")
    field_hopper.cubin()


def same_compiler():
    return compiler() == BUDGET["compiler"]


def test_products_are_not_serialised():
    assert not SERIALISED.search(field_hopper.cubin()[1])


def test_no_kernel_spills_and_registers_stay_within_the_budget():
    found = field_hopper.resources()
    assert found.keys() == BUDGET["resources"].keys()
    slack = 0 if same_compiler() else MORE_REGISTERS
    for name, used in found.items():
        assert used["spilled"] == 0, (name, used)
        assert used["registers"] <= BUDGET["resources"][name]["registers"] + slack, (name, used)


@pytest.mark.parametrize("kernel", [n for n in BUDGET["loops"] if n.startswith("forward") and "wide" not in n])
def test_the_main_loop_of_the_forward(kernel):
    """It takes two steps: 64 products in 16 chains, 12 waits, and SiLU of 256 numbers per thread."""
    loop = field_hopper.role_loops(kernel)["consumers"][1]
    text = [i.text for i in loop.body]
    assert loop.opcodes()["HGMMA"] == 64
    assert sum("WARPGROUP.DEPBAR" in t for t in text) == 12
    units = ["MUFU.TANH"] if "tanh" in kernel else ["MUFU.EX2", "MUFU.RCP"]
    assert [sum(unit in t for t in text) for unit in units] == [256] * len(units)


@pytest.mark.parametrize("kernel", [n for n in BUDGET["loops"] if n.startswith("backward")])
def test_products_run_during_the_backwards_tanh(kernel):
    """ptxas may move the wait for du before the tanh, which needs y only. Then the tensor cores idle meanwhile."""
    body = field_hopper.role_loops(kernel)["inner groups"][1].body
    waits = [n for n, i in enumerate(body) if "WARPGROUP.DEPBAR" in i.text]
    assert len(waits) == 2
    units = [n for n, i in enumerate(body) if re.search(r"MUFU\.(TANH|EX2)", i.text)]
    assert len(units) == (16 if "wide" in kernel else 32)
    assert sum(waits[0] < n < waits[1] for n in units) >= 0.9 * len(units)


def test_every_big_kernel_multiplies_by_warp_group():
    for name, count in BUDGET["products"].items():
        opcodes = [i.opcode for i in field_hopper.code()[name]]
        assert opcodes.count("HGMMA") == count and opcodes.count("HMMA") <= 16 * ("fp16" in name) * 4, name


@pytest.mark.parametrize("kernel", BUDGET["loops"])
def test_loops_of_each_role(kernel):
    found = {role: [len(loop) for loop in loops] for role, loops in field_hopper.role_loops(kernel).items()}
    expected = BUDGET["loops"][kernel]
    assert found.keys() == expected.keys()
    for role, lengths in found.items():
        slack = 1 if same_compiler() else LONGER
        assert all(a <= b * slack for a, b in zip(lengths, expected[role], strict=True)), (
            role,
            lengths,
            expected[role],
        )


@pytest.mark.parametrize("kernel", BUDGET["loops"])
def test_no_role_uses_more_registers_than_it_is_granted(kernel):
    """A thread that touches a register beyond setmaxnreg's number reads or writes another thread's."""
    granted = {role.name: role.granted for role in field_hopper.roles_of(kernel)}
    asked = {
        int(n, 16) for i in field_hopper.code()[kernel] for n in re.findall(r"USETMAXREG.* 0x([0-9a-f]+)$", i.text)
    }
    assert asked == set(granted.values())
    for role, used in field_hopper.registers_of_roles(kernel).items():
        assert used <= granted[role], (role, used)


def test_the_forward_is_predicted_at_least_half_as_fast_again_as_tritons():
    """The backward is not: both are bound by memory there. docs/notes/static_counts.md says why."""
    for network, (forward, _) in BUDGET["predicted"].items():
        assert BUDGET["triton"][network][0] >= 1.5 * forward


def test_the_big_kernels_fit_in_the_shared_memory_of_a_thread_block():
    found = field_hopper.shared_memory()
    assert found == BUDGET["shared"] and max(found.values()) <= 227 * 1024


def test_the_budget_is_what_the_machine_code_gives():
    """The other tests allow less than the budget. The notes show its numbers, so they must not be those of older code."""
    if not same_compiler():
        pytest.skip(f"the budget is that of {BUDGET['compiler']}")
    found, budget = field_hopper.counted(), dict(BUDGET)
    if json.loads(field_roof.PATH.read_text())["compiler"] != f"Triton {triton.__version__}":
        del found["triton"], budget["triton"]
    assert found == budget


def test_the_notes_show_the_budget():
    notes = NOTES.read_text()
    assert field_hopper.table(BUDGET) in notes
    assert field_hopper.compared_with_measured(BUDGET) in notes
