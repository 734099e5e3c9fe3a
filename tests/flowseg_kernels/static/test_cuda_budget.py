"""What the CUDA kernels cost by their machine code, for every architecture: registers, spills, instructions of the inner loops.

Compiled are the kernels of three channels in fp32 (FLOWSEG_ONLY_3); CONTRIBUTING.md has the command for all of them.
"""

import concurrent.futures
import functools
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from . import sass

ROOT = pathlib.Path(__file__).resolve().parents[3]
BUDGET = json.loads(pathlib.Path(__file__).with_name("budget.json").read_text())
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc was not found: no machine code to look at")


@functools.cache
def cubin(architecture: int) -> pathlib.Path:
    folder = ROOT / "build" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"sm_{architecture}.cubin"
    sources = [
        pathlib.Path(__file__).with_name("kernels.cu"),
        *(ROOT / "csrc").rglob("*.cuh"),
        *(ROOT / "csrc").rglob("*.h"),
    ]
    if not target.exists() or target.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin", "-DFLOWSEG_ONLY_3", f"-I{ROOT}/csrc",
                   f"-I{ROOT}/csrc/include", str(sources[0]), "-o", str(target)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.fixture(scope="module", autouse=True)
def _compiled_in_parallel():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(cubin, ARCHITECTURES))


def short(name: str) -> str:
    """_ZN7flowseg4cuda7correctIfLi3E...: correct."""
    length = re.match(r"_ZN7flowseg4cuda(?:L)?(\d+)", name)
    assert length, name
    return name[length.end() : length.end() + int(length[1])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_stay_within_the_budget_and_none_spill(architecture):
    used = sass.resources(cubin(architecture))
    assert {short(name) for name in used} == set(BUDGET["registers"])
    for name, resources in used.items():
        # Spilled registers live in the stack frame.
        assert resources["STACK"] == 0 and resources["LOCAL"] == 0, (name, resources)
        assert resources["REG"] <= BUDGET["registers"][short(name)], (name, resources)


def loops_of(architecture: int, kernel: str) -> list[sass.Loop]:
    code = sass.disassemble(cubin(architecture))
    return [loop for name, body in code.items() if short(name) == kernel for loop in sass.innermost_loops(body)]


@pytest.mark.parametrize("kernel", ["correct", "loss"])
def test_instructions_of_the_correction(kernel):
    """One reciprocal stands for one (pixel, class): the loop without own classes, and the one that leaves them out."""
    loops = [loop for loop in loops_of(90, kernel) if loop.opcodes()["MUFU"] >= 8 and not loop.opcodes()["CALL"]]
    cost = sorted(len(loop) / loop.opcodes()["MUFU"] for loop in loops)
    assert len(cost) == 2, [loop.opcodes() for loop in loops]
    assert cost[0] <= BUDGET["instructions"]["rivals"] and cost[1] <= BUDGET["instructions"]["rivals and own class"], (
        cost
    )


@pytest.mark.parametrize(
    "kernel, unrolled, budget", [("decode_by_grid", 8, "candidate"), ("decode_by_search", 16, "searched")]
)
def test_instructions_of_decoding(kernel, unrolled, budget):
    """The first square of each distance is a product, the others are multiply-adds: products count candidates."""
    loops = [loop for loop in loops_of(90, kernel) if loop.opcodes()["FMUL"] == unrolled and loop.opcodes()["FFMA"]]
    cost = [len(loop) / unrolled for loop in loops]
    # The search that also finds the second nearest is another loop of the same kernel.
    assert cost and (max(cost) if budget == "candidate" else min(cost)) <= BUDGET["instructions"][budget], cost
