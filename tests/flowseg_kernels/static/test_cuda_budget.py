"""The CUDA kernels stay within budget.json on every architecture: registers, no spills, instructions of the inner loops.

The numbers are exact for the nvcc that budget.json names; another version may exceed them by SLACK.

Every kernel is compiled for sm_90. For the other architectures only the kernels for three channels in fp32 are compiled, or all
with `--every-variant` (6 minutes of one core).
"""

import concurrent.futures
import functools
import json

import pytest

from ...conftest import proof
from . import cuda_budget, sass

BUDGET = json.loads(cuda_budget.PATH.read_text())
#: A number of registers, and a fraction of the instructions.
SLACK = {"registers": 8, "instructions": 0.03}


@pytest.fixture(scope="module")
def every(request):
    """Compile the kernels, two architectures at a time. Returns by architecture whether every kernel was compiled for it."""
    proof("cuda_code", None if sass.find_tool("nvcc") else "nvcc was not found: no machine code to look at")
    all_of_them = request.config.getoption("--every-variant")
    compiled = {a: all_of_them or a == 90 for a in (90, *cuda_budget.ARCHITECTURES)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(cuda_budget.cubin, compiled, compiled.values()))
    return compiled


@pytest.mark.parametrize("architecture", cuda_budget.ARCHITECTURES)
def test_registers_stay_within_the_budget_and_none_spill(architecture, every):
    found = cuda_budget.resources(architecture, every[architecture])
    common = {name for name in BUDGET["registers"] if len(name.split()) == 1 or name.endswith(("float", "float 3"))}
    common.update(cuda_budget.FEWEST_CHANNELS)
    assert set(found) == (set(BUDGET["registers"]) if every[architecture] else common)
    slack = SLACK["registers"] * another_compiler()
    for name, used in found.items():
        assert used["spilled"] == 0, (name, used)
        assert used["registers"] <= BUDGET["registers"][name][str(architecture)] + slack, (name, used)


def another_compiler():
    return cuda_budget.compiler() != BUDGET["compiler"]


@functools.cache
def instructions():
    return cuda_budget.instructions()


@pytest.mark.parametrize("kernel", BUDGET["instructions"])
def test_instructions_of_the_inner_loops(kernel, every):
    found = instructions()[kernel]
    assert found.keys() == BUDGET["instructions"][kernel].keys()
    slack = SLACK["instructions"] * another_compiler()
    for name, cost in found.items():
        assert cost <= BUDGET["instructions"][kernel][name] * (1 + slack), (name, cost)


def test_the_budget_keeps_what_was_promised():
    """The inner loop of the correction has at most 14 instructions per pair, and decoding 12 per candidate, 14 for the margin.

    32 centroids, which a warp searches at once for a point outside the grid, have at most as many as two candidates.
    """
    costs = BUDGET["instructions"]
    assert max(*costs["correct"].values(), *costs["loss"].values()) <= 14
    listed, outside, listed_two, outside_two = costs["decode_by_grid"].values()
    assert max(listed, costs["decode_by_search"]["centroid"]) <= 12 and outside <= 24
    assert listed_two <= 14 and outside_two <= 28


def test_the_notes_show_the_budget():
    assert cuda_budget.table(BUDGET) in cuda_budget.NOTES.read_text()


@pytest.mark.parametrize("kernel, loads", [("interpolate", 4 + 7), ("interpolate_backward", 8 + 4 + 7), ("scale", 4)])
def test_pixels_move_16_bytes_at_a_time(kernel, loads, every):
    """Eight pixels of a plane take two accesses in fp32 and one in each half precision. Seven loads are of labels, and the
    backward can also read its gradient in fp64. The compiler must not merge a vector store with the stores of single elements of
    the other branch: it would then split the vector store."""
    ((_, body),) = [item for item in cuda_budget.code().items() if cuda_budget.short_name(item[0]) == f"{kernel} float"]
    assert sum("STG.E.128" in i.text for i in body) == 4
    assert sum("LDG.E.128" in i.text for i in body) == loads
