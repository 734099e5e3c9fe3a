"""neural_field against PixNerd's own form of unfold, bmm and fold, eager and compiled: Hx 64, r 2, p 16; decoder L of 2 blocks and
XL of 4 at 256 and 1024 patches (an image of 256^2 and 512^2), also 4096 on a GPU."""

import itertools

import pytest
import torch

import flowseg_kernels as fk

from . import field_plain
from .conftest import DEVICE, OURS, QUICK, backend_of, skip_unless_it_runs

PATCHES = (4, 16) if QUICK else (4096, 1024, 256) if DEVICE == "cuda" else (256, 1024)
DEPTH = {"XL": 4, "L": 2} if DEVICE == "cuda" else {"L": 2, "XL": 4}
#: What the targets judge comes first: a GPU's time may be short.
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
#: Multiplications and additions of a product of (256, Hx, r Hx).
OPERATIONS = 2 * 256 * 64 * 128


class Field:
    """Rotating inputs of one decoder, size and dtype."""

    def __init__(self, model, patches, dtype):
        self.dtype, self.spread, self.pixels = dtype, 0.0, patches * 256
        self.depth, self.patches = DEPTH[model], patches
        self.name = f"{model} {patches} patches {str(dtype).removeprefix('torch.')}"
        size = {"patches": patches, "depth": self.depth, "dtype": dtype, "device": DEVICE}
        # On a GPU more than its cache holds, whose reads would pass for memory's.
        weights = patches * self.depth * 4 * 64 * 64 * dtype.itemsize
        sets = min(16, max(2, -(-200_000_000 // weights))) if DEVICE == "cuda" else 2
        self.sets = [field_plain.inputs(**size, seed=seed) for seed in range(sets)]
        self.right = None

    def rotate(self):
        return itertools.cycle(self.sets)

    def expected(self):
        """The output and every gradient for the first inputs, by the reference in fp32."""
        if self.right is None:
            inputs = [v.detach().float().requires_grad_() for v in self.sets[0]]
            with fk.use_backend("reference"):
                out = fk.neural_field(*inputs)
            self.right = [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]
        return self.right


@pytest.fixture(scope="module")
def fields():
    """fields(model, patches, dtype): a Field; the last one is kept, as they are large."""
    kept = {}

    def get(*key):
        if key not in kept:
            kept.clear()
            kept[key] = Field(*key)
        return kept[key]

    return get


def forward_of(entry, dtype):
    if entry in OURS or entry == "reference":
        return fk.neural_field
    dct = field_plain.features(dtype).to(DEVICE)
    if entry == "torch.compile":
        compiled = torch.compile(field_plain.field, dynamic=False)
        return lambda *inputs: compiled(*inputs, dct, views=True)
    return lambda *inputs: field_plain.field(*inputs, dct)


def field_call(entry, dtype, what):
    """The function of the inputs that an entry times: a list of the output and, with its backward, all gradients."""
    field = forward_of(entry, dtype)

    def run(inputs):
        with backend_of("(reference)" if entry == "reference" else entry):
            if what == "forward":
                with torch.no_grad():
                    return [field(*inputs)]
            out = field(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    return run


def assert_agrees(run, work):
    allowed = 0.05 if work.dtype == torch.bfloat16 else 1e-5 if DEVICE == "cpu" else 2e-3
    for place, (got, want) in enumerate(zip(run(work.sets[0]), work.expected())):
        error = float((got.float() - want).norm() / want.norm())
        assert error < allowed, f"{'output' if place == 0 else f'gradient {place}'}: {error}"


@pytest.mark.parametrize("entry", [*OURS, "reference", "eager", "torch.compile"])
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("model", DEPTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neural_field(fields, measure, dtype, model, patches, what, entry):
    skip_unless_it_runs(entry, "neural_field")
    main = model == "XL" and patches == PATCHES[0]
    if entry == "reference" and (dtype == torch.bfloat16 or not main):
        pytest.skip("computes in fp32, as its entry at XL does")
    if entry == "torch.compile" and not main:
        pytest.skip("takes long to compile, so only at XL")
    if OURS == ("ours",) and entry == "ours" and fk.available_backends("neural_field")[0] == "reference":
        pytest.skip("no compiled kernel")
    run, work = field_call(entry, dtype, what), fields(model, patches, dtype)
    assert_agrees(run, work)
    cost = {}
    if entry in OURS:
        # Weights are by far the most of what moves.
        weights = work.sets[0][1]
        moved = weights.numel() * weights.element_size()
        times = sum(field_plain.products(part, DEVICE) for part in what.split("+"))
        cost = {
            "moved": moved * (1 if what == "forward" else 3),
            "operations": times * work.depth * patches * OPERATIONS,
        }
        cost["rate"] = "bf16" if dtype == torch.bfloat16 else "multiply"
    measure(run, work, f"neural_field {what}", entry, **cost)
