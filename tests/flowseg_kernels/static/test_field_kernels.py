"""The machine code of the neural field's kernels for Hopper: no spills, products that overlap, and the length of the main loop.

The numbers hold for nvcc 13.0. Another version may exceed the instructions by SLACK.
"""

import re
import subprocess

import pytest

from ...conftest import proof
from . import cuda_budget, sass

KERNELS = 9
SLACK = 0.05
#: Instructions of two steps of the forward without and with the stored states, by whether tanh is approximate.
INSTRUCTIONS = {(True, False): 1290, (True, True): 1550, (False, False): 2315, (False, True): 2575}


@pytest.fixture(scope="module")
def compiled():
    """Compile every kernel. Returns what ptxas says, and the path of the cubin."""
    proof("cuda_code", None if sass.find_tool("nvcc") else "nvcc was not found: no machine code to look at")
    source, target = (
        cuda_budget.PATH.with_name("field_kernels.cu"),
        cuda_budget.ROOT / "build" / "static" / "field.cubin",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sass.find_tool("nvcc"), "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v",
               "-cubin", f"-I{cuda_budget.ROOT}/csrc", source, "-o", target]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, target


def test_no_kernel_spills(compiled):
    log, binary = compiled
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spilled == [("0", "0", "0")] * KERNELS
    assert all(used["LOCAL"] == 0 for used in sass.resources(binary).values())


def test_ptxas_does_not_wait_for_products(compiled):
    """Warnings C7510 to C7519 say that it waits for every product before the next, or that it fences where the kernel does not."""
    assert not re.search(r".*\(C75\d\d\).*", compiled[0])


def test_the_main_loop_of_the_forward(compiled):
    """It takes two steps: 64 products in 16 chains, 12 waits, and SiLU of 256 numbers per thread."""
    found = {name: body for name, body in sass.disassemble(compiled[1]).items() if "forward_blocks" in name}
    assert len(found) == 6
    slack = SLACK * (cuda_budget.compiler() != "nvcc 13.0")
    for name, body in found.items():
        tanh, keeps = (flag == "1" for flag in re.search(r"PairELb(\d)ELb(\d)", name).groups())
        loop = min((a for a in sass.loops(body) if a.opcodes()["HGMMA"] >= 64), key=len)
        text = [i.text for i in loop.body]
        assert loop.opcodes()["HGMMA"] == 64, name
        assert sum("WARPGROUP.DEPBAR" in t for t in text) == 12, name
        units = ["MUFU.TANH"] if tanh else ["MUFU.EX2", "MUFU.RCP"]
        assert [sum(unit in t for t in text) for unit in units] == [256] * len(units), name
        assert len(loop) <= INSTRUCTIONS[tanh, keeps] * (1 + slack), (name, len(loop))
