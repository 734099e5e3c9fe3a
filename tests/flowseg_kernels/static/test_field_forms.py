"""The field's Triton kernels, compiled ahead of time: no spills, tensor cores, a budget of registers and shared memory.

By default the forms PixNerd's sizes launch in bf16, for every target; `--every-variant` compiles all variants for all targets
(about 5 minutes). Pointers are declared aligned, as tensors are: a launch compiles that form.
"""

import importlib.util
import re

import pytest

from flowseg_kernels.runtime.triton_forms import INTERPRETED

from . import sass

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowseg_kernels.ops.neural_field.triton_kernels import form, launch_settings, patches_at_once, variants

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
#: For sm_90: the most registers a thread may use, so that at least this many programs share a multiprocessor; instructions of the
#: innermost loop; kilobytes of shared memory.
BUDGET = {
    "forward": {"registers": 255, "programs": 2, "loop": 250, "kilobytes": 40},
    "states": {"registers": 255, "programs": 2, "loop": 250, "kilobytes": 40},
    "rows": {"registers": 255, "programs": 2, "loop": 400, "kilobytes": 48},
    "weights": {"registers": 255, "programs": 2, "loop": 230, "kilobytes": 32},
}
#: The instruction that multiplies matrices, in the machine code of each target.
PRODUCT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


def compiled(variant, target):
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(variant.signature.values()) if kind[0] == "*"}
    constants, options = dict(variant.constants), dict(variant.options)
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
        if "TANH" in constants:  # NVIDIA's instruction
            constants["TANH"] = False
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return compile_kernel(ASTSource(variant.kernel, variant.signature, constants, aligned), target=gpu, options=options)


def spilled_bytes(kernel, target):
    if target.startswith("gfx"):
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
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
    every, wide = request.config.getoption("--every-variant", default=False), target in ("sm_90", "sm_100")
    forms = variants(wide) if every else [form(name, warp_groups=wide) for name in ("forward", "rows", "weights")]
    for variant in forms:
        kernel = compiled(variant, target)
        # fp32 products at Hx = 128 hold whole rows of both operands; what spills there lies outside the loops.
        allowed = 16 if variant.name.startswith("neural_field rows fp32 Hx=128") else 0
        assert spilled_bytes(kernel, target) <= allowed, variant.name
        if target in PRODUCT and "Hx=64" in variant.name and "bf16" in variant.name:
            (code,) = sass.disassemble(kernel.asm["cubin"]).values()
            assert any(i.opcode == PRODUCT[target] for i in code), variant.name


def test_settings_fit_every_size():
    for kernel in BUDGET:
        for hidden in (7, 16, 32, 64, 128):
            for ratio in (1, 2, 4):
                for p in (2, 4, 8, 16, 32):
                    for operand in (torch.float32, torch.bfloat16):
                        rows, width, warps, _ = launch_settings(kernel, hidden, ratio * hidden, p * p, operand)
                        assert 16 <= rows <= 64 and 16 <= width <= 64 and 1 <= warps <= 8
                        assert rows < 2 * max(16, p * p) and width < 2 * max(16, ratio * hidden)


def test_scratch_of_the_backward_is_bounded():
    assert patches_at_once(6, 4) == 6
    assert patches_at_once(1024, 4) == 128
    assert patches_at_once(256, 4) == 128
    assert patches_at_once(16 * 1024, 4) == 2048
    assert patches_at_once(0, 4) == 0
