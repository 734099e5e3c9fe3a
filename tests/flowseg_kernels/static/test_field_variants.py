"""The field's Triton kernels, compiled ahead of time: no spills, tensor cores, a budget of registers and shared memory.

By default the variants that PixNerd's sizes launch in bf16 are compiled for every target. `--every-variant` compiles all variants
for all targets (about 3 minutes).
"""

import importlib.util
import itertools
import json
import re

import pytest

from flowseg_kernels.runtime.triton import INTERPRETED

from . import sass

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

import torch
import triton

from flowseg_kernels.ops.neural_field.triton_settings import (
    Sizes,
    launch_settings,
    patches_per_group,
    patches_per_round,
    scratch_of,
    states_fit_in_gradients,
    tiles_per_program,
)

from ...support.aot import compiled, field_variant, field_variants
from . import field_roof
from .cuda_budget import NOTES

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
MATMUL_PATHS = {"sm_90": "warp_groups", "sm_100": "tensor_memory"}
BUDGET = json.loads(field_roof.PATH.read_text())
#: Tolerance for other versions of Triton than the budget's. Triton 3.6 takes 10 more registers in the forward.
REGISTERS_MORE, INSTRUCTIONS_MORE, SHARE_LESS = 12, 1.1, 5
#: The instruction that multiplies matrices, in the machine code of each target.
PRODUCT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


def spilled_bytes(kernel, target):
    if target.startswith("gfx"):
        # Only vector registers spill to memory. Scalar registers spill to lanes of vector registers.
        spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spilled
        return sum(map(int, spilled))
    (used,) = sass.resources(kernel.asm["cubin"]).values()
    return used["STACK"] + used["LOCAL"]


def same_compiler():
    return BUDGET["compiler"] == f"Triton {triton.__version__}"


@pytest.mark.parametrize("name", field_roof.KERNELS)
def test_within_its_budget_on_sm_90(name):
    found, budget = field_roof.resources(name), BUDGET["resources"][name]
    if same_compiler():
        assert found == budget
    assert found["spilled"] == 0
    assert found["registers"] <= budget["registers"] + REGISTERS_MORE and found["programs"] >= budget["programs"]
    assert found["shared"] <= budget["shared"] * INSTRUCTIONS_MORE
    assert found["HGMMA"] > 0 and found["loop"] <= budget["loop"] * INSTRUCTIONS_MORE


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_tensor_cores_on_every_target(target, request):
    every, path = request.config.getoption("--every-variant", default=False), MATMUL_PATHS.get(target, "registers")
    default = {field_variant(name, matmul_path=path).name for name in (*field_roof.KERNELS, "table", "finish")}
    for variant in [v for v in field_variants(path) if every or v.name in default]:
        kernel = compiled(variant, target)
        spilled = spilled_bytes(kernel, target)
        if path == "registers" and "backward" in variant.name and "16 Hx=128" in variant.name and spilled:
            # In the widest variants both operands pass through registers. A few words per tile spill, outside the weights' loop.
            (code,) = sass.disassemble(kernel.asm["cubin"]).values()
            assert spilled <= 256
            assert not any({"STL", "LDL"} & set(loop.opcodes()) for loop in sass.innermost_loops(code)), variant.name
        else:
            assert spilled == 0, variant.name
        if target in PRODUCT and "bf16 Hx=64" in variant.name and not re.search("table|finish", variant.name):
            (code,) = sass.disassemble(kernel.asm["cubin"]).values()
            assert any(i.opcode == PRODUCT[target] for i in code), variant.name


def test_predictions_and_notes_are_those_of_the_machine_code():
    """Predicted, not measured: the kernels reach at least half of the roof."""
    found = field_roof.counted()
    if same_compiler():
        assert found == BUDGET
    for image, shares in BUDGET["shares"].items():
        assert min(shares[:2]) >= 50
        assert all(a >= b - SHARE_LESS for a, b in zip(found["shares"][image], shares)), image
    notes = NOTES.read_text()
    assert all(part in notes for part in field_roof.table(BUDGET).split("\n\n"))


def test_only_bf16_takes_the_approximate_tanh():
    """Its error of 2^-11 is one ulp of fp16 and thousands of ulps of fp32."""
    for dtype in ("bf16", "fp16", "fp32"):
        for name in ("forward", "backward"):
            (code,) = sass.disassemble(compiled(field_variant(name, dtype, 16, 1, 4), "sm_90").asm["cubin"]).values()
            assert any("MUFU.TANH" in i.text for i in code) == (dtype == "bf16"), (name, dtype)


def test_settings_fit_every_size():
    for kernel in field_roof.KERNELS:
        for hidden in (7, 16, 32, 64, 128):
            for ratio in (1, 2, 4):
                for p in (2, 4, 8, 16, 32):
                    for operand, path in itertools.product(
                        (torch.float32, torch.bfloat16), ("warp_groups", "tensor_memory", "registers")
                    ):
                        rows, width, warps, _ = launch_settings(kernel, hidden, ratio * hidden, p * p, operand, path)
                        assert 16 <= rows <= 256 and 16 <= width <= 64 and 1 <= warps <= 16
                        assert rows < 2 * max(16, p * p) and width < 2 * max(16, ratio * hidden)


def test_programs_of_the_forward_fill_a_gpu():
    assert tiles_per_program(1024, 256, 64) == 4 and tiles_per_program(256, 256, 64) == 4
    assert tiles_per_program(128, 256, 64) == 2 and tiles_per_program(64, 256, 64) == 1
    assert tiles_per_program(1024, 16, 16) == 1 and tiles_per_program(64, 1024, 64) == 4
    assert tiles_per_program(1024, 24 * 24, 64) == 1, "nine tiles divide into neither twos nor fours"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden, ratio, p, depth", [(64, 2, 16, 2), (64, 2, 16, 4), (128, 4, 32, 8), (7, 1, 3, 1)])
def test_scratch_of_the_backward_is_bounded(hidden, ratio, p, depth, dtype):
    """At most 1 GiB, or the scratch of 256 patches if that is more. At PixNerd's sizes 4,096 patches are one round."""
    sizes = Sizes(hidden, ratio * hidden, p, 3, dtype, True, True, "ieee", "warp_groups", p <= 2 * ratio * hidden // p)
    per_patch, grads = scratch_of(sizes, depth)
    each = per_patch.bytes(dtype, grads)
    for patches in (0, 6, 256, 1024, 4096, 5000, 1 << 20):
        at_once = patches_per_round(patches, each)
        assert at_once <= patches and at_once * each <= max(2**30, 256 * each)
        assert at_once == patches or at_once >= 256
        if (hidden, p) == (64, 16) and dtype == torch.bfloat16:
            assert at_once == min(patches, 4096) and at_once * each <= 320 * 2**20
    if (hidden, p, dtype) == (64, 16, torch.float32):
        assert patches_per_round(4096, each) == 4096


def test_states_take_the_gradients_memory_only_where_they_fit():
    bf16, fp32 = torch.bfloat16, torch.float32
    assert states_fit_in_gradients(64, 128, 16, bf16, bf16) and states_fit_in_gradients(64, 128, 16, fp32, fp32)
    assert not states_fit_in_gradients(64, 128, 17, bf16, bf16) and not states_fit_in_gradients(64, 64, 16, bf16, bf16)
    assert not states_fit_in_gradients(64, 128, 16, fp32, bf16), (
        "an fp32 state takes twice the memory of a bf16 gradient"
    )


def test_groups_of_patches_grow_with_their_number():
    assert [patches_per_group(n) for n in (0, 9, 1024, 1025, 4096, 16384)] == [4, 4, 4, 5, 16, 64]
