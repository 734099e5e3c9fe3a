"""The field's Triton kernels, compiled ahead of time: no spills, tensor cores, a budget of registers and shared memory.

By default the forms PixNerd's sizes launch in bf16, for every target; `--every-variant` compiles all variants for all targets
(about 3 minutes). Pointers are declared aligned, as tensors are: a launch compiles that form.
"""

import importlib.util
import itertools
import re

import pytest

from flowseg_kernels.runtime.triton_forms import INTERPRETED

from . import sass

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

import torch

from flowseg_kernels.ops.neural_field.triton_kernels import (
    form,
    launch_settings,
    patches_at_once,
    tiles_together,
    variants,
)

from . import field_roof
from .field_roof import compiled

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KINDS = {"sm_90": "warp_groups", "sm_100": "tensor_memory"}
#: For sm_90: the most registers a thread may use, so that at least this many programs share a multiprocessor; instructions of the
#: innermost loop; kilobytes of shared memory.
BUDGET = {
    "forward": {"registers": 255, "programs": 2, "loop": 250, "kilobytes": 40},
    "states": {"registers": 255, "programs": 2, "loop": 250, "kilobytes": 40},
    "backward": {"registers": 255, "programs": 1, "loop": 590, "kilobytes": 104},
    "enter": {"registers": 128, "programs": 4, "loop": None, "kilobytes": 16},
}
#: The instruction that multiplies matrices, in the machine code of each target.
PRODUCT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


def spilled_bytes(kernel, target):
    if target.startswith("gfx"):
        # A scalar register is saved to a lane of a vector register, not to memory.
        spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilled
        return sum(map(int, spilled))
    (used,) = sass.resources(kernel.asm["cubin"]).values()
    return used["STACK"] + used["LOCAL"]


@pytest.mark.parametrize("name", BUDGET)
def test_within_its_budget_on_sm_90(name):
    kernel, budget = compiled(form(name), "sm_90"), BUDGET[name]
    (used,) = sass.resources(kernel.asm["cubin"]).values()
    assert spilled_bytes(kernel, "sm_90") == 0
    assert used["REG"] <= budget["registers"]
    threads = 32 * kernel.metadata.num_warps
    granted = -(-used["REG"] // 8) * 8 * threads
    assert 65536 // granted >= budget["programs"]
    assert kernel.metadata.shared <= 1024 * budget["kilobytes"]
    (code,) = sass.disassemble(kernel.asm["cubin"]).values()
    if budget["loop"]:
        assert any(i.opcode == "HGMMA" for i in code)
        assert min(len(loop) for loop in sass.innermost_loops(code) if "HGMMA" in loop.opcodes()) <= budget["loop"]


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_tensor_cores_on_every_target(target, request):
    every, kind = request.config.getoption("--every-variant", default=False), KINDS.get(target, "registers")
    forms = variants(kind) if every else [form(name, products=kind) for name in BUDGET]
    for variant in forms:
        kernel = compiled(variant, target)
        # The widest form, where both operands pass through registers: 16 KiB of weights a slice beside the sums.
        widest = kind == "registers" and "backward fp16 Hx=128" in variant.name
        assert spilled_bytes(kernel, target) <= (200 if widest else 0), variant.name
        if target in PRODUCT and "Hx=64" in variant.name and "bf16" in variant.name:
            (code,) = sass.disassemble(kernel.asm["cubin"]).values()
            assert any(i.opcode == PRODUCT[target] for i in code), variant.name


def test_at_least_half_of_the_roof():
    """A prediction from machine code, no measurement."""
    found = field_roof.shares()
    assert min(min(ways) for ways in found.values()) >= 0.5


def test_only_bf16_takes_the_approximate_tanh():
    """Its error, 2^-11, is an ulp of fp16 and thousands of fp32."""
    for dtype in ("bf16", "fp16", "fp32"):
        for name in ("forward", "backward"):
            (code,) = sass.disassemble(compiled(form(name, dtype, 16, 1, 4), "sm_90").asm["cubin"]).values()
            assert any("MUFU.TANH" in i.text for i in code) == (dtype == "bf16"), (name, dtype)


def test_settings_fit_every_size():
    for kernel in BUDGET:
        for hidden in (7, 16, 32, 64, 128):
            for ratio in (1, 2, 4):
                for p in (2, 4, 8, 16, 32):
                    for operand, kind in itertools.product(
                        (torch.float32, torch.bfloat16), ("warp_groups", "tensor_memory", "registers")
                    ):
                        rows, width, warps, _ = launch_settings(kernel, hidden, ratio * hidden, p * p, operand, kind)
                        assert 16 <= rows <= 256 and 16 <= width <= 64 and 1 <= warps <= 16
                        assert rows < 2 * max(16, p * p) and width < 2 * max(16, ratio * hidden)


def test_programs_of_the_forward_fill_a_gpu():
    assert tiles_together(1024, 256, 64) == 4 and tiles_together(256, 256, 64) == 4
    assert tiles_together(128, 256, 64) == 2 and tiles_together(64, 256, 64) == 1
    assert tiles_together(1024, 16, 16) == 1 and tiles_together(64, 1024, 64) == 4
    assert tiles_together(1024, 24 * 24, 64) == 1, "nine tiles are no whole number of twos or fours"


def test_scratch_of_the_backward_is_bounded():
    assert patches_at_once(6) == 6
    assert patches_at_once(1024) == patches_at_once(300) == 256
    assert patches_at_once(16 * 1024) == 2048
    assert patches_at_once(0) == 0
