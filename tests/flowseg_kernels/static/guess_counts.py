"""Counts the work of a warp of the CUDA kernels that decodes 128 pixels by guesses, from simulated pixels with 8 channels.

`python -m tests.flowseg_kernels.static.guess_counts` (10 s) prints the table of docs/notes/performance.md: passes, further tries of
classes of a cell, comparisons with the rivals of a class, searches of all classes, and the instructions of all of them, at most,
from budget.json. It simulates csrc/cuda/decode_guesses.cuh.
"""

import itertools
import json

import torch

import flowseg_kernels as fk
from flowseg_kernels.decode_guesses import build_decode_guesses

from . import cuda_budget

SIDE, SPREAD, CHANNELS, PIXELS_PER_THREAD, MANY_CLASSES = 256, 0.05, 8, 4, 512


def points(mu, square):
    """Pixels near codes in squares of one class, in the order of the lanes: (warps, 32, PIXELS_PER_THREAD, C)."""
    few = torch.randint(0, len(mu), (SIDE // square, SIDE // square))
    labels = few.repeat_interleave(square, 0).repeat_interleave(square, 1)
    x = mu[labels.flatten()] + SPREAD * torch.randn(SIDE * SIDE, mu.shape[1])
    return x.view(-1, 32, PIXELS_PER_THREAD, mu.shape[1])


def tried(mu, tables, x, most):
    """Three values per point: the class that is proved, or -1; the nearest class that was tried, or -1; the number of tries."""
    axes = len(tables.projection)
    cells = round((len(tables.starts) - 1) ** (1 / axes))
    position = x @ tables.projection[:, :-1].T + tables.projection[:, -1]
    cell = (position.clamp(0, cells - 1).long() * cells ** torch.arange(axes)).sum(-1)
    first = tables.starts[cell].long()
    count = (tables.starts[cell + 1] - first).clamp_max(most)
    proved, near = torch.full(cell.shape, -1), torch.full(cell.shape, -1)
    nearest, tries = torch.full(cell.shape, torch.inf), torch.zeros(cell.shape, dtype=torch.int64)
    for i in range(most):
        active = (proved < 0) & (i < count)
        candidate = tables.members[(first + i).clamp_max(len(tables.members) - 1)].long()
        d = (x - mu[candidate]).square().sum(-1)
        tries += active
        closer = active & (d < nearest)
        nearest, near = torch.where(closer, d, nearest), torch.where(closer, candidate, near)
        proved = torch.where(active & (d < tables.certain[candidate, 0]), candidate, proved)
    return proved, near, tries


def passes_of(mu, tables, x, proved, tries):
    """The passes of all warps together, and their tries beyond one per pass."""
    pending = torch.ones(proved.shape, dtype=torch.bool)
    helps = torch.ones(len(x), dtype=torch.bool)
    passes = further = 0
    for number in range(PIXELS_PER_THREAD):
        active = pending.any(2)
        at = pending.float().argmax(2, keepdim=True)
        passes += int(active.any(1).sum())
        further += int(((tries.gather(2, at)[..., 0] * active).amax(1) - 1).clamp_min(0).sum())
        own = proved.gather(2, at)
        pending.scatter_(2, at, False)
        d = (x - mu[own.clamp_min(0)]).square().sum(-1)
        hit = pending & (d < tables.certain[own.clamp_min(0), 0]) & (own >= 0) & (active & helps[:, None])[..., None]
        pending &= ~hit
        if number == 0:
            helps = 4 * hit.any(2).sum(1) >= active.sum(1)
    return passes, further


def unproved(mu, tables, x, near):
    """Comparisons with rivals, and searches of all classes, for points that no try proves."""
    rivals = searches = 0
    for point, k in zip(x, near.tolist()):
        while k >= 0:
            d = (point - mu[k]).square().sum()
            decides = bool(d < tables.certain[k, -1])
            if not decides and len(mu) < MANY_CLASSES:
                k = -1
                break
            others = tables.rivals[k].long()
            distances = (point - mu[others]).square().sum(1)
            rivals += 1
            if decides:
                break
            k = int(others[distances.argmin()]) if distances.min() < d else -1
        searches += k < 0
    return rivals, searches


def main():
    torch.manual_seed(0)
    costs = json.loads(cuda_budget.PATH.read_text())["instructions"]["decode_by_guesses 8"]
    one_pass, lanes, searched = costs.values()
    print("| K | squares | passes | further tries | rivals | searches | instructions at most | of a search |")
    print("|---|---|---|---|---|---|---|---|")
    for classes, square in itertools.product((150, 1000, 20_000), (32, 1)):
        mu = fk.kronecker_centroids(classes, CHANNELS)
        tables = build_decode_guesses(mu)
        x = points(mu, square)
        proved, near, tries = tried(mu, tables, x, 8 if classes < MANY_CLASSES else 16)
        missed = proved < 0
        found = (*passes_of(mu, tables, x, proved, tries), *unproved(mu, tables, x[missed], near[missed]))
        passes, further, rivals, searches = (n / len(x) for n in found)
        # A try and a comparison with rivals take at most the instructions of 32 classes and of a pass.
        cost = one_pass * (passes + rivals) + lanes * (further + searches * classes / 32)
        shown = " | ".join(f"{v:.3f}" for v in (passes, further, rivals, searches))
        print(f"| {classes} | {square} | {shown} | {cost:.0f} | {128 / 32 * searched * classes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
