"""Entries of `distance_correction`: our backends, plain PyTorch eager and compiled, KeOps."""

import torch

import flowseg_kernels as fk

from .. import plain
from ..settings import DEVICE, OURS, backend_of
from .availability import peer


def keops_correction(mu, eps):
    lazy = peer("pykeops.torch").LazyTensor
    codes = lazy(mu[None].contiguous())

    def run(x, labels):
        rows = x.movedim(1, -1).reshape(-1, 1, x.shape[1]).contiguous()
        diff = lazy(rows) - codes
        r = 1 / ((diff**2).sum(-1) + eps)
        total = r.sum(1)
        pull = ((r * r) * diff).sum(1)
        own = rows[:, 0] - mu[labels.flatten()]
        own = own / (own.square().sum(1, keepdim=True) + eps)
        return (2 * (own - pull / total)).view(*labels.shape, -1).movedim(-1, 1)

    return run


def correction_cost(work, bytes_per_channel=4):
    """Bytes moved, pairs of a pixel and a class, and operations of the multiply units.

    Each pair takes C multiply-adds for the distance, one slot for the division, one square and C multiply-adds for the sums. On a
    GPU the same units also do the C subtractions and one sum.
    """
    c, pairs = work.channels, work.pixels * work.classes
    slots = 3 * c + 3 if DEVICE == "cuda" else 2 * c + 2
    return {
        "moved": work.pixels * (2 * c * bytes_per_channel + work.label_dtype.itemsize),
        "operations": 2 * pairs * slots,
        "pairs": pairs,
    }


def assert_corrects(run, entry, work):
    """The entry agrees with plain PyTorch in fp64 on the first and the last rows."""
    inputs = work.sets[0]
    height = inputs["x"].shape[2]
    ends = min(height // 2, max(1, min(32, 2**16 // work.classes) // 2))
    rows = [*range(ends), *range(height - ends, height)]
    bf16 = "bf16" in entry
    x = inputs["bf16" if bf16 else "x"][:1, :, rows]
    mu = work.codebook.centroids.double()
    want = plain.correction(x.double(), inputs["long"][:1, rows], mu, work.codebook.default_eps)
    with backend_of(entry):
        got = run(inputs)[:1, :, rows].double()
    scale = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-2 if bf16 else 1e-4, atol=(5e-3 if bf16 else 1e-5) * max(scale, 1.0))


def correction_entry(entry, work):
    """The function of the inputs that an entry times."""
    mu, eps = work.codebook.centroids, work.codebook.default_eps
    if entry in OURS:
        return lambda i: fk.distance_correction(i["x"], i["labels"], work.codebook)
    if entry.endswith("bf16"):
        return lambda i: fk.distance_correction(i["bf16"], i["labels"], work.codebook)
    if entry == "eager":
        return lambda i: plain.correction(i["x"], i["long"], mu, eps)
    if entry == "torch.compile":
        compiled = torch.compile(plain.correction, dynamic=False)
        return lambda i: compiled(i["x"], i["long"], mu, eps)
    formula = keops_correction(mu, eps)
    return lambda i: formula(i["x"], i["long"])
