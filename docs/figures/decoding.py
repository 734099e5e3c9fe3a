"""A slice of code space: the class of each point, and the number of candidates per cell of the decode grid."""

import matplotlib.pyplot as plt
import torch

import flowseg_kernels as fk
from flowseg_kernels.decode_tables import decode_tables
from flowseg_kernels.derived import derived_from

from . import style

CLASSES, HEIGHT = 150, 0.1


def candidates(book):
    """The number of centroids that each cell (channel 2, 1, 0) of the grid lists."""
    (cells, records, groups), _, _ = decode_tables(derived_from(book.centroids), torch.device("cpu"))
    in_record = records[:, 0].isfinite().sum(dim=1)
    total = in_record.clone()
    # A list has g consecutive records; the total at its first record is the sum over all g.
    for more in range(1, int(groups.max())):
        total[: len(total) - more] += torch.where(groups[: len(total) - more] > more, in_record[more:], 0)
    return torch.where(cells[0] >= 0, 1, total[(-1 - cells[0]).clamp_min(0)])


def draw():
    book = fk.Codebook(fk.kronecker_centroids(CLASSES))
    (cells, *_), low, scale = decode_tables(derived_from(book.centroids), torch.device("cpu"))
    high = low + cells.shape[-1] / scale
    line = torch.linspace(low, high, 512)
    v, u = torch.meshgrid(line, line, indexing="ij")
    labels = book.decode(torch.stack((u, v, torch.full_like(u, HEIGHT)))[None])[0]
    shuffled = plt.get_cmap("hsv")(torch.randperm(CLASSES, generator=torch.Generator().manual_seed(3)) / CLASSES)
    count = candidates(book)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.1), layout="constrained")
    box = {"extent": (low, high, low, high), "origin": "lower", "interpolation": "nearest"}
    axes[0].imshow(shuffled[labels], alpha=0.6, **box)
    near = book.centroids[(book.centroids[:, 2] - HEIGHT).abs() < 0.1]
    axes[0].scatter(near[:, 0], near[:, 1], s=8, color="black")
    axes[0].set(title="nearest code", xlabel="channel 0", ylabel="channel 1")
    shown = axes[1].imshow(count[int((HEIGHT - low) * scale)].clamp_max(8), cmap="viridis_r", vmin=1, vmax=8, **box)
    axes[1].set(title="candidates per cell", xlabel="channel 0")
    figure.colorbar(shown, ax=axes, shrink=0.8, ticks=(1, 2, 4, 6, 8))
    share, mean = float((count == 1).double().mean()), float(count.double().mean())
    print(f"one candidate: {share:.3f} of all cells; mean {mean:.2f}; most {int(count.max())}")
    style.save(figure, "method_decoding")
