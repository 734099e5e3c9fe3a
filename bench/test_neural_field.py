"""neural_field against PixNerd's own form, eager and compiled: 256 patches, 4 blocks, Hx 64, r 2, p 16."""

import itertools

import pytest
import torch

import flowseg_kernels as fk

from . import field_plain

SETS = 2


@pytest.fixture(scope="module")
def sets():
    """Rotating inputs by dtype: together they exceed every cache."""
    made = [field_plain.inputs(seed=seed) for seed in range(SETS)]
    half = [[v.detach().bfloat16().requires_grad_() for v in inputs] for inputs in made]
    return {torch.float32: made, torch.bfloat16: half}


def forward_of(entry, dtype):
    dct = field_plain.features(dtype)
    if entry == "torch.compile":
        compiled = torch.compile(field_plain.field, dynamic=False)
        return lambda *inputs: compiled(*inputs, dct, views=True)
    if entry == "eager":
        return lambda *inputs: field_plain.field(*inputs, dct)

    def ours(*inputs):
        with fk.use_backend("reference" if entry == "reference" else "cpu"):
            return fk.neural_field(*inputs)

    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("entry", ["ours", "reference", "eager", "torch.compile"])
def test_neural_field(sets, benchmark, entry, what, dtype):
    if dtype == torch.bfloat16 and entry in ("reference", "torch.compile"):
        pytest.skip("the entries of interest in bf16 are ours and eager")
    if entry == "ours" and "cpu" not in fk.available_backends("neural_field"):
        pytest.skip("no compiled kernel")
    field = forward_of(entry, dtype)

    def run(inputs):
        if what == "forward":
            with torch.no_grad():
                return [field(*inputs)]
        out = field(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    inputs = sets[dtype][0]
    with fk.use_backend("reference"):
        want = fk.neural_field(*(v.float() for v in inputs))
    error = (run(inputs)[0].float() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    rotation = itertools.cycle(sets[dtype])
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"neural_field {what} {name}"
    benchmark.extra_info.update(op=f"neural_field {what}", workload=f"256 patches {name}", entry=entry, pixels=65536)
    benchmark.pedantic(run, setup=lambda: ((next(rotation),), {}), rounds=5, warmup_rounds=1)
