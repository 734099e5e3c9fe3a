"""A whole training step and a sampling run: our kernels, the reference backend, and decoder, loss and decoding in plain PyTorch."""

import contextlib
import copy
import itertools

import pytest
import torch

import flowseg_kernels as fk

from . import plain
from .cases.availability import skip_unless_it_runs
from .field_plain import EagerDecoder
from .settings import BATCH, DEVICE, QUICK, SIZE

CLASSES = 150
#: name: (side of the image, images, precision of the network's products)
NETWORKS = {"nano": (min(SIZE, 256), BATCH if DEVICE == "cuda" else 4, "no")}
if DEVICE == "cuda":
    # The paper's setting comes first, because the time on a GPU may run out.
    NETWORKS = {"L/16": (512, 16, "bf16"), **NETWORKS}
#: "ours" takes the automatic choice of backends, as a user gets it.
ENTRIES = ("ours", "reference", "eager", *(("torch.compile",) if DEVICE == "cuda" else ()))


class Stack:
    """A network with rotating images and labels."""

    def __init__(self, size):
        pytest.importorskip(
            "accelerate", reason="the dependencies of flowseg are not installed; `make install` installs them"
        )
        from flowseg.config import Config
        from flowseg.model import build_model
        from flowseg.segment import autocast

        torch.manual_seed(0)
        side, batch, precision = (32, 1, "no") if QUICK else NETWORKS[size]
        self.name = size if size == "nano" else f"{size} {side} batch {batch} {precision}"
        self.spread, self.batch, self.side, self.pixels = 0.0, batch, side, batch * side**2
        self.autocast = lambda: autocast(precision, torch.device(DEVICE))
        #: Relative tolerance of a loss, and share of pixels that may change their class, both due to rounding in the network.
        self.rounding, self.moved = (1e-3, 0.001) if precision == "no" else (2e-2, 0.1)
        settings = {"model": {"size": size}, "codes": {"channels": 3, "sequence": "sqrt_primes"}}
        self.model = build_model(Config.model_validate(settings)).to(DEVICE)
        # The last layer starts at zero: without this the decoder's output would not depend on its inputs.
        for p in self.model.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 and not p.any() else None
        # PixNerd's own decoder with the same parameters.
        self.eager = self.with_decoder(EagerDecoder(self.model.decoder))
        self.codebook = fk.Codebook(fk.kronecker_centroids(CLASSES, 3)).to(DEVICE)
        shape = (batch, side, side)
        self.sets = [
            {
                "image": (torch.rand(batch, 3, *shape[1:]) * 2 - 1).to(DEVICE),
                "labels": torch.randint(0, CLASSES, shape, dtype=torch.uint8).to(DEVICE),
                "t": torch.rand(batch).to(DEVICE),
            }
            for _ in range(4)
        ]

    def with_decoder(self, decoder):
        model = copy.copy(self.model)
        model._modules = {**self.model._modules, "decoder": decoder}
        return model

    def of(self, entry):
        """The model of an entry and its loss in plain PyTorch, None for our loss."""
        if entry == "eager":
            return self.eager, plain.loss
        if entry == "torch.compile":
            decoder = torch.compile(EagerDecoder(self.model.decoder, views=True), dynamic=False)
            return self.with_decoder(decoder), torch.compile(plain.loss, dynamic=False)
        return self.model, None

    def rotate(self):
        return itertools.cycle(self.sets)


@pytest.fixture(scope="module")
def stacks():
    """stacks(size): a Stack. Only the last one is kept, because stacks are large."""
    made = {}

    def get(size):
        if size not in made:
            made.clear()
            made[size] = Stack(size)
        return made[size]

    return get


def within(entry):
    return fk.use_backend("reference") if entry == "reference" else contextlib.nullcontext()


def loss_of(stack, i, model, plain_loss=None):
    """The loss of one batch. With `plain_loss`, interpolation and loss are plain PyTorch."""
    if plain_loss is None:
        x_t = fk.flow_interpolate(i["image"], i["labels"], i["t"], stack.codebook)
    else:
        mu, labels, t = stack.codebook.centroids, i["labels"].long(), i["t"][:, None, None, None]
        x_t = (1 - t) * i["image"] + t * mu[labels].movedim(-1, 1)
    with stack.autocast():
        prediction = model(x_t, i["t"], i["image"]).float()
    if plain_loss is None:
        return fk.flow_loss(prediction, i["image"], i["labels"], i["t"], stack.codebook)
    return plain_loss(prediction, i["image"], labels, i["t"], mu, stack.codebook.default_eps)


def skip_entry(size, entry):
    skip_unless_it_runs(entry, "nearest_centroid")
    if size != "nano" and entry == "reference":
        pytest.skip("timed with the nano network only")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("size", NETWORKS)
def test_training_step(stacks, measure, size, entry):
    skip_entry(size, entry)
    stack = stacks(size)
    model, plain_loss = stack.of(entry)
    optimizer = torch.optim.AdamW(stack.model.parameters(), lr=0.0, fused=True)
    with torch.no_grad(), within("reference"):
        want = loss_of(stack, stack.sets[0], stack.model)
    with torch.no_grad(), within(entry):
        found = loss_of(stack, stack.sets[0], model, plain_loss)
    torch.testing.assert_close(found, want, rtol=stack.rounding, atol=0)

    def run(i):
        with within(entry):
            optimizer.zero_grad(set_to_none=True)
            loss_of(stack, i, model, plain_loss).backward()
            optimizer.step()

    measure(run, stack, "training step", entry, graph=False)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "torch.compile"])
@pytest.mark.parametrize("size", NETWORKS)
def test_sampling(stacks, measure, size, entry):
    """Ten Euler steps and decoding. The plain form decodes with cdist."""
    skip_entry(size, entry)
    from flowseg.flow import integrate

    stack = stacks(size)
    model, _ = stack.of(entry)

    def field(i, model):
        def velocity(x, t):
            with stack.autocast():
                return model(x, t, i["image"]).float()

        return integrate(velocity, i["image"], steps=2 if QUICK else 10)

    @torch.no_grad()
    def run(i):
        with within(entry):
            x = field(i, model)
            if entry == "eager":
                return plain.nearest(x, stack.codebook.centroids)
            return fk.nearest_centroid(x, stack.codebook, out_dtype=torch.uint8)

    with torch.no_grad(), within("reference"):
        want = fk.nearest_centroid(field(stack.sets[0], stack.model), stack.codebook)
    same = (run(stack.sets[0]).long() == want).float().mean()
    # Rounding in the network changes the class of the few pixels between two codes.
    assert same > 1 - stack.moved
    measure(run, stack, "sampling", entry, graph=False)
