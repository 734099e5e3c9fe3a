"""Entries of `neural_field`: our backends, the reference, and PixNerd's own form of unfold, bmm and fold, eager and compiled."""

import itertools

import torch

import flowseg_kernels as fk

from .. import field_plain
from ..settings import DEVICE, OURS, QUICK, backend_of

#: Patches per image: 256 of an image of 256^2 pixels, 1024 of 512^2, 4096 of 1024^2.
PATCHES = (4, 16) if QUICK else (4096, 1024, 256) if DEVICE == "cuda" else (256, 1024)
#: model: field blocks. The models and dtypes of the targets come first, because the time on a GPU may run out.
DEPTH = {"XL": 4, "L": 2} if DEVICE == "cuda" else {"L": 2, "XL": 4}
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
#: Operations of one product of (256, Hx) and (Hx, r Hx) with Hx = 64 and r = 2, two per multiply-add.
OPERATIONS = 2 * 256 * 64 * 128


class Field:
    """Rotating inputs of one decoder, size and dtype."""

    def __init__(self, model, patches, dtype):
        self.dtype, self.spread, self.pixels = dtype, 0.0, patches * 256
        self.depth, self.patches = DEPTH[model], patches
        self.name = f"{model} {patches} patches {str(dtype).removeprefix('torch.')}"
        size = {"patches": patches, "depth": self.depth, "dtype": dtype, "device": DEVICE}
        # Together the sets must exceed a GPU's cache, or the calls would read the cache instead of the memory.
        weights = patches * self.depth * 4 * 64 * 64 * dtype.itemsize
        sets = min(16, max(2, -(-200_000_000 // weights))) if DEVICE == "cuda" else 2
        self.sets = [field_plain.inputs(**size, seed=seed) for seed in range(sets)]
        self.reference = None

    def rotate(self):
        return itertools.cycle(self.sets)

    def expected(self):
        """The output and every gradient for the first inputs, by the reference in fp32."""
        if self.reference is None:
            inputs = [v.detach().float().requires_grad_() for v in self.sets[0]]
            with fk.use_backend("reference"):
                out = fk.neural_field(*inputs)
            self.reference = [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]
        return self.reference


def forward_of(entry, dtype):
    if entry in OURS or entry == "reference":
        return fk.neural_field
    dct = field_plain.features(dtype).to(DEVICE)
    if entry == "torch.compile":
        compiled = torch.compile(field_plain.field, dynamic=False)
        return lambda *inputs: compiled(*inputs, dct, views=True)
    return lambda *inputs: field_plain.field(*inputs, dct)


def field_call(entry, dtype, what):
    """The function of the inputs that an entry times; it returns a list of the output and, with backward, all gradients."""
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
    """Output and gradients are close to the reference in fp32."""
    allowed = 0.05 if work.dtype == torch.bfloat16 else 1e-5 if DEVICE == "cpu" else 2e-3
    for place, (got, want) in enumerate(zip(run(work.sets[0]), work.expected())):
        error = float((got.float() - want).norm() / want.norm())
        assert error < allowed, f"{'output' if place == 0 else f'gradient {place}'}: {error}"
