"""Time one training step and one sampling run of a whole model, against the same model with decoder and loss in eager PyTorch.

Random weights, one image, velocity prediction, 150 classes. The eager side has PixNerd's decoder, the loss and the decoding in
plain PyTorch; transformer, optimiser and solver are the same. Loss, gradient and field of both sides are compared before anything
is timed. Each side runs in its own process: the second training step is timed, and the peak memory is that of both steps.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

import flowseg_kernels as fk

from . import plain
from .field_plain import EagerDecoder
from .machine import resident

CLASSES, EULER_STEPS = 150, 10
SIDES = ("ours", "eager")
TASKS = ("train", "sample")


class Case:
    """One side of the comparison, ready to run."""

    def __init__(self, side, size, pixels, precision):
        from flowseg.config import Config
        from flowseg.flow import integrate
        from flowseg.model import build_model
        from flowseg.segment import autocast, default_device

        self.device, self.side = default_device(), side
        self.autocast, self.integrate = lambda: autocast(precision, self.device), integrate
        config = Config.model_validate({"model": {"size": size}, "codes": {"channels": 3, "sequence": "sqrt_primes"}})
        self.model = build_model(config).to(self.device)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters():
                # A new model has layers of zeros, which would make both sides return zeros.
                p.normal_(std=0.02) if not p.any() else None
        if side == "eager":
            self.model.decoder = EagerDecoder(self.model.decoder)
        self.codebook = fk.Codebook(fk.kronecker_centroids(CLASSES, 3)).to(self.device)
        self.image = (torch.rand(1, 3, pixels, pixels) * 2 - 1).to(self.device)
        self.labels = torch.randint(0, CLASSES, (1, pixels, pixels)).to(self.device)
        self.t = torch.tensor([0.4], device=self.device)

    def predict(self, x, t):
        with self.autocast():
            return self.model(x, t, self.image).float()

    def loss(self):
        if self.side == "ours":
            x_t = fk.flow_interpolate(self.image, self.labels, self.t, self.codebook)
            return fk.flow_loss(self.predict(x_t, self.t), self.image, self.labels, self.t, self.codebook)
        mu, t = self.codebook.centroids, self.t[:, None, None, None]
        x_t = (1 - t) * self.image + t * mu[self.labels].movedim(-1, 1)
        return plain.loss(self.predict(x_t, self.t), self.image, self.labels, self.t, mu, self.codebook.default_eps)

    @torch.no_grad()
    def sample(self, steps=EULER_STEPS):
        field = self.integrate(self.predict, self.image, steps=steps)
        if self.side == "ours":
            return field, fk.nearest_centroid(field, self.codebook, out_dtype=torch.uint8)
        return field, plain.nearest(field, self.codebook.centroids)

    def trainer(self):
        """A function that runs one training step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

        def step():
            self.loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def synchronize(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def check(size, pixels):
    """Relative differences of both sides in float32; fails if one exceeds 2e-3."""
    case = Case("ours", size, pixels, "no")
    results = {}
    for side in SIDES:
        if side == "eager":
            case.side, case.model.decoder = side, EagerDecoder(case.model.decoder)
        loss = case.loss()
        # The gradient of the first layer passes through all other layers.
        gradient = torch.autograd.grad(loss, case.model.patch_embed.proj.weight)[0]
        results[side] = loss.detach(), gradient, case.sample(steps=2)[0]
    differences = {}
    for name, ours, eager in zip(("loss", "gradient", "field"), *results.values()):
        differences[name] = float((ours - eager).abs().max() / eager.abs().max())
        assert differences[name] < 2e-3, (name, differences)
    return differences


def measure(side, task, size, pixels, precision):
    """Seconds and bytes of one side, as a dictionary."""
    case = Case(side, size, pixels, precision)
    run = case.trainer() if task == "train" else case.sample
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters())
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident()["VmRSS"]
    # Warm up by one whole training step, which creates the optimiser's state, or by one evaluation of sampling.
    run() if task == "train" else run(steps=1)
    case.synchronize()
    start = time.perf_counter()
    run()
    case.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if case.device.type == "cuda" else resident()["VmHWM"]
    return {"seconds": seconds, "peak": peak, "above": peak - before, "weights": weights, "device": str(case.device)}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="L/16", help="nano, S/16, B/16, L/16 or XL/16")
    parser.add_argument("--pixels", type=int, default=256, help="side of the image")
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16"))
    parser.add_argument("--only", choices=("check", *TASKS), help="run one part only")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    shape = given.size, given.pixels
    if given.case:
        print(json.dumps(measure(*given.case, *shape, given.precision)))
        return
    if given.only in (None, "check"):
        found = check(*shape)
        print(
            "largest relative difference in float32:", ", ".join(f"{k} {v:.1e}" for k, v in found.items()), flush=True
        )
    again = ["--size", given.size, "--pixels", str(given.pixels), "--precision", given.precision]
    for task in TASKS if given.only is None else [given.only] if given.only in TASKS else []:
        rows = {}
        for side in SIDES:
            command = [sys.executable, "-m", "bench", "step", *again, "--case", side, task]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[side] = json.loads(done.stdout)
        ours, eager = rows["ours"], rows["eager"]
        title = "training step" if task == "train" else f"{EULER_STEPS}-step sampling"
        print(
            f"{given.size} {given.pixels} x {given.pixels}, {given.precision}, {ours['device']}, {title}: "
            f"{ours['seconds']:.2f} s against {eager['seconds']:.2f} s ({eager['seconds'] / ours['seconds']:.2f}x), peak "
            f"{ours['peak'] / 2**20:,.0f} against {eager['peak'] / 2**20:,.0f} MiB, weights "
            f"{ours['weights'] / 2**20:,.0f} MiB",
            flush=True,
        )
