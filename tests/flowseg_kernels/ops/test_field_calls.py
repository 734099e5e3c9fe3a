"""Tests which calls the field's CUDA kernels take, with which arguments, and where all other calls go. Needs no GPU."""

import dataclasses

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.ops.neural_field import cuda, reference
from flowseg_kernels.runtime import backend
from flowseg_kernels.runtime.backend import OPS

from ...support.neural_field import VARIANTS, field_inputs

#: Changes of a call that the kernels take -> whether they still take it.
CALLS = {
    "bf16": ({}, True),
    "fp16": ({"dtype": torch.float16}, True),
    "Hx = 64": ({"hidden": 64, "ratio": 1}, True),
    "Hx = 128": ({"hidden": 128, "ratio": 1}, True),
    "C = 16": ({"channels": 16}, True),
    "no blocks": ({"depth": 0}, True),
    "plain form": ({"form": "plain"}, True),
    "fp32": ({"dtype": torch.float32}, False),
    "fp64": ({"dtype": torch.float64}, False),
    "Hx = 12": ({"hidden": 12}, False),
    "Hx = 136": ({"hidden": 136, "ratio": 1}, False),
    "no patches": ({"batch": 0}, False),
}


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the two kernels, which check their arguments and run the reference. The value is the list of their calls.

    The "cuda" backend then runs on CPU tensors, and passes calls on to the reference.
    """
    calls = []

    def forward(x, *rest):
        calls.append("forward")
        *tensors, patch_size, ratio, eps, both, residual = rest
        for value in tensors:
            assert value.dtype == x.dtype and value.is_contiguous() and value.data_ptr() % 16 == 0
        assert isinstance(both, bool) and isinstance(residual, bool)
        options = ("both" if both else "first", "residual" if residual else "plain")
        return (x, *tensors, patch_size, ratio, eps, *options)

    def run_backward(grad, *arguments):
        found = reference.neural_field_bwd(grad, *forward(*arguments), [True] * 8)
        calls[-1] = "backward"
        return found

    monkeypatch.setattr(cuda, "_forward", lambda *arguments: reference.neural_field(*forward(*arguments)))
    monkeypatch.setattr(cuda, "_backward", run_backward)
    for op in ("neural_field", "neural_field_bwd"):
        table = {name: found for name, found in OPS[op].items() if name in ("cuda", "reference")}
        table["cuda"] = dataclasses.replace(table["cuda"], why_not=lambda device, channels: None)
        monkeypatch.setitem(OPS, op, table)
    return calls


def results(leaves, **options):
    """The output, and the gradients of the leaves that need one."""
    out = fk.neural_field(*leaves, patch_size=4, **options)
    return [out, *torch.autograd.grad(out.square().sum(), [v for v in leaves if v is not None and v.requires_grad])]


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_the_kernels_take_and_others(kernels, name):
    change, taken = CALLS[name]
    options = {"dtype": torch.bfloat16, **change}
    leaves = field_inputs(**options)
    said = {"mlp_ratio": options.get("ratio", 2), "form": options.get("form", "residual")}
    with fk.use_backend("reference"):
        want = results(leaves, **said)
    with fk.use_backend("cuda"):
        got = results(leaves, **said)
    assert kernels == (["forward", "backward"] if taken else [])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_patches_beyond_the_index_range_of_the_kernels_are_passed_on():
    tensors = field_inputs(dtype=torch.bfloat16)
    assert cuda.takes(2048, *tensors) and not cuda.takes(2049, *tensors)
    long = torch.empty(1, 3, 16, 2**27, dtype=torch.bfloat16, device="meta")
    assert not cuda.takes(16, long, *tensors[1:]) and cuda.takes(16, long[..., 16:], *tensors[1:])


@pytest.mark.parametrize("place", range(8))
def test_tensors_of_two_types_are_passed_on(kernels, place):
    leaves = [
        v.detach().to(torch.float32 if at == place else v.dtype)
        for at, v in enumerate(field_inputs(dtype=torch.bfloat16))
    ]
    with fk.use_backend("cuda"):
        fk.neural_field(*leaves, patch_size=4)
    assert not kernels


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_odd_layouts_and_wanted_gradients(kernels, variant):
    """Weights that start two bytes late, transposed parameters, and gradients of every second tensor only."""
    normalise, form = variant
    late = []
    for at, value in enumerate(field_inputs(dtype=torch.bfloat16, form=form)):
        if value is not None:
            memory = torch.empty(value.numel() + 1, dtype=value.dtype)
            moved = memory[1:].view(value.shape[::-1]).permute(*reversed(range(value.ndim)))
            value = moved.copy_(value.detach()).requires_grad_(at % 2 == 0)
        late.append(value)
    options = {"normalise": normalise, "form": form}
    with fk.use_backend("reference"):
        want = results(late, **options)
    with fk.use_backend("cuda"):
        got = results(late, **options)
    assert kernels == ["forward", "backward"]
    # The reference sums in another order for other strides.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01 * float(b.abs().max()))


def test_contiguous_tensors_are_not_copied():
    """Small calls are bound by the host: each copy would be one more launch."""
    tensors = [v.detach() for v in field_inputs(dtype=torch.bfloat16)]
    found = cuda._kernel_arguments(*tensors, 4, 2, 1e-6, "first", "plain")
    assert all(a is b for a, b in zip(found, tensors)) and found[8:] == (4, 2, 1e-6, False, False)


def test_gradients_that_are_not_needed_are_empty(kernels):
    tensors = [v.detach() for v in field_inputs(dtype=torch.float16)]
    needs = [place % 3 == 0 for place in range(8)]
    arguments = (tensors[0], *tensors, 4, 2, 1e-6, "both", "residual", needs, "cuda")
    found = torch.ops.flowseg.neural_field_bwd.default(*arguments)
    assert kernels == ["backward"]
    assert [g.shape for g in found] == [v.shape if need else (0,) for v, need in zip(tensors, needs)]


def test_a_gradient_of_another_type_is_passed_on(kernels):
    tensors = [v.detach() for v in field_inputs(dtype=torch.float16)]
    arguments = (tensors[0].float(), *tensors, 4, 2, 1e-6, "both", "residual", [True] * 8, "cuda")
    torch.ops.flowseg.neural_field_bwd.default(*arguments)
    assert not kernels


def test_under_autocast_the_kernels_take_fp32_parameters(kernels):
    leaves = field_inputs(dtype=torch.float32)
    with fk.use_backend("cuda"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = fk.neural_field(*leaves, patch_size=4)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert kernels == ["forward", "backward"] and out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)


def test_other_calls_go_to_the_first_other_backend_in_the_automatic_order(monkeypatch):
    monkeypatch.setattr(backend, "_order", lambda op, device: ("cuda", "triton", "reference"))
    can, cannot = (lambda *call: None), (lambda *call: "no")
    for why_not, want in ((can, "triton"), (cannot, "reference")):
        table = {name: dataclasses.replace(OPS["neural_field"][name], why_not=can) for name in ("cuda", "reference")}
        table["triton"] = dataclasses.replace(OPS["neural_field"]["triton"], why_not=why_not)
        monkeypatch.setitem(OPS, "neural_field", table)
        assert backend.select("neural_field", "cuda", 3, "") is table["cuda"]
        assert backend.instead_of("cuda", "neural_field", "cuda", 3) is table[want]


@pytest.mark.parametrize("capability, taken", [((9, 0), True), ((8, 0), False), ((10, 0), False)])
def test_the_device_of_the_tensors_decides(monkeypatch, capability, taken):
    """A process may have GPUs of several kinds: the backend is there if one of them is a Hopper."""

    class OnGpu(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 3)

    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    cuda._is_hopper.cache_clear()
    tensors = [v.detach() for v in field_inputs(dtype=torch.bfloat16)]
    try:
        assert cuda.takes(4, tensors[0].as_subclass(OnGpu), *tensors[1:]) is taken and asked == [3]
    finally:
        cuda._is_hopper.cache_clear()
