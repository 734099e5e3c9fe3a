"""A whole training step and sampling of the stack: our kernels, the reference backend, and its own parts as plain PyTorch."""

import contextlib
import copy
import itertools

import pytest
import torch

import flowseg_kernels as fk

from . import plain
from .conftest import BATCH, DEVICE, OURS, QUICK, SIZE, backend_of, skip_unless_it_runs
from .field_plain import EagerDecoder

CLASSES = 150


class Stack:
    """The nano network with rotating images and labels."""

    def __init__(self):
        pytest.importorskip(
            "accelerate", reason="the stack's own dependencies are not installed; `make install` installs them"
        )
        from flowseg.config import Config
        from flowseg.model import build_model

        torch.manual_seed(0)
        self.name, self.spread = "nano", 0.0
        self.batch, self.side = (1, 32) if QUICK else (BATCH if DEVICE == "cuda" else 4, min(SIZE, 256))
        self.pixels = self.batch * self.side**2
        self.config = Config.model_validate({"codes": {"channels": 3, "sequence": "sqrt_primes"}})
        self.model = build_model(self.config).to(DEVICE)
        # Its last layer starts at zero, which would leave nothing for the decoder to tell apart.
        for p in self.model.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 and not p.any() else None
        # The same parameters under PixNerd's own decoder.
        self.eager = copy.copy(self.model)
        self.eager._modules = {**self.model._modules, "decoder": EagerDecoder(self.model.decoder)}
        self.codebook = fk.Codebook(fk.kronecker_centroids(CLASSES, 3)).to(DEVICE)
        shape = (self.batch, self.side, self.side)
        self.sets = [
            {
                "image": (torch.rand(self.batch, 3, *shape[1:]) * 2 - 1).to(DEVICE),
                "labels": torch.randint(0, CLASSES, shape, dtype=torch.uint8).to(DEVICE),
                "t": torch.rand(self.batch).to(DEVICE),
            }
            for _ in range(4)
        ]

    def rotate(self):
        return itertools.cycle(self.sets)


@pytest.fixture(scope="module")
def stack():
    return Stack()


def within(entry):
    return fk.use_backend("reference") if entry == "reference" else contextlib.nullcontext()


def plain_step(stack, i):
    mu, eps = stack.codebook.centroids, stack.codebook.default_eps
    labels, t = i["labels"].long(), i["t"][:, None, None, None]
    x_t = (1 - t) * i["image"] + t * mu[labels].movedim(-1, 1)
    prediction = stack.eager(x_t, i["t"], i["image"]).float()
    return plain.loss(prediction, i["image"], labels, i["t"], mu, eps)


def our_step(stack, i):
    x_t = fk.flow_interpolate(i["image"], i["labels"], i["t"], stack.codebook)
    prediction = stack.model(x_t, i["t"], i["image"]).float()
    return fk.flow_loss(prediction, i["image"], i["labels"], i["t"], stack.codebook)


@pytest.mark.parametrize("entry", [*OURS, "reference", "eager"])
def test_training_step(stack, measure, entry):
    skip_unless_it_runs(entry)
    optimizer = torch.optim.AdamW(stack.model.parameters(), lr=0.0, fused=True)
    step = plain_step if entry == "eager" else our_step
    with torch.no_grad(), within("reference"):
        want = our_step(stack, stack.sets[0])
    with torch.no_grad(), within(entry), backend_of(entry):
        torch.testing.assert_close(step(stack, stack.sets[0]), want, rtol=1e-3, atol=0)

    def run(i):
        with within(entry):
            optimizer.zero_grad(set_to_none=True)
            step(stack, i).backward()
            optimizer.step()

    measure(run, stack, "training step", entry)


@pytest.mark.parametrize("entry", [*OURS, "reference", "eager"])
def test_sampling(stack, measure, entry):
    """Ten Euler steps and decoding; the plain form decodes with cdist."""
    skip_unless_it_runs(entry, "nearest_centroid")
    from flowseg.flow import integrate

    def field(i, model):
        return integrate(lambda x, t: model(x, t, i["image"]).float(), i["image"], steps=2 if QUICK else 10)

    @torch.no_grad()
    def run(i):
        with within(entry):
            x = field(i, stack.eager if entry == "eager" else stack.model)
            if entry == "eager":
                return plain.nearest(x, stack.codebook.centroids)
            return fk.nearest_centroid(x, stack.codebook, out_dtype=torch.uint8)

    with torch.no_grad(), within("reference"):
        want = fk.nearest_centroid(field(stack.sets[0], stack.model), stack.codebook)
    with backend_of(entry):
        same = (run(stack.sets[0]).long() == want).float().mean()
    # Rounding of the network moves the few pixels that lie between two codes.
    assert same > 0.999
    measure(run, stack, "sampling", entry)
