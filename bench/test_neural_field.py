"""neural_field against PixNerd's own form of unfold, bmm and fold, eager and compiled.

Hx = 64, r = 2, p = 16; decoder L has 2 blocks and XL has 4; 256 and 1024 patches (images of 256^2 and 512^2), on a GPU also 4096.
"""

import pytest
import torch

import flowseg_kernels as fk

from . import field_plain
from .cases.availability import skip_unless_it_runs
from .cases.field import DEPTH, DTYPES, OPERATIONS, PATCHES, Field, assert_agrees, field_call
from .settings import DEVICE, OURS


@pytest.fixture(scope="module")
def fields():
    """fields(model, patches, dtype): a Field. Only the last one is kept, because fields are large."""
    kept = {}

    def get(*key):
        if key not in kept:
            kept.clear()
            kept[key] = Field(*key)
        return kept[key]

    return get


@pytest.mark.parametrize("entry", [*OURS, "reference", "eager", "torch.compile"])
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("model", DEPTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neural_field(fields, measure, dtype, model, patches, what, entry):
    skip_unless_it_runs(entry, "neural_field")
    if entry == "ours (cuda)" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit tensors, and pass this call on to Triton")
    main = model == "XL" and patches == PATCHES[0]
    if entry == "reference" and (dtype == torch.bfloat16 or not main):
        pytest.skip("the reference computes in fp32; its XL entry shows the time")
    if entry == "torch.compile" and not main:
        pytest.skip("compiling is slow, so only XL is timed")
    if OURS == ("ours",) and entry == "ours" and fk.available_backends("neural_field")[0] == "reference":
        pytest.skip("no compiled kernel")
    run, work = field_call(entry, dtype, what), fields(model, patches, dtype)
    assert_agrees(run, work)
    cost = {}
    if entry in OURS:
        # The generated weights are by far the most bytes moved.
        weights = work.sets[0][1]
        moved = weights.numel() * weights.element_size()
        times = sum(field_plain.products(part, DEVICE) for part in what.split("+"))
        cost = {
            "moved": moved * (1 if what == "forward" else 3),
            "operations": times * work.depth * patches * OPERATIONS,
        }
        cost["rate"] = "bf16" if dtype == torch.bfloat16 else "multiply"
    measure(run, work, f"neural_field {what}", entry, **cost)
