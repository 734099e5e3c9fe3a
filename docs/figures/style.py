"""Shared by the pictures: colours of classes, a synthetic scene, saving."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "images"

plt.rcParams |= {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}

#: Classes of the scene.
CLASSES = ("sky", "ground", "road", "wall", "roof", "tree", "sun")


def scene(height=96, width=128, seed=0):
    """A synthetic landscape: image (1, 3, H, W) in [-1, 1] with noise and shading, labels (1, H, W)."""
    v, u = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij")
    labels = torch.zeros(height, width, dtype=torch.int64)
    labels[v > 0.62 + 0.03 * torch.sin(5 * u)] = 1
    labels[(v > 0.62) & ((u - 0.45).abs() < 0.05 + 0.6 * (v - 0.62))] = 2
    labels[(v > 0.4) & (v < 0.72) & (u > 0.78) & (u < 1.18)] = 3
    labels[(v > 0.22) & (v <= 0.4) & ((u - 0.98).abs() < 0.24 * (v - 0.22) / 0.18)] = 4
    labels[((u - 0.22) ** 2 + (v - 0.42) ** 2 < 0.022) | (((u - 0.22).abs() < 0.025) & (v > 0.5) & (v < 0.72))] = 5
    labels[(u - 0.62) ** 2 + (v - 0.16) ** 2 < 0.007] = 6
    colours = torch.tensor(
        [
            [0.2, 0.5, 0.9],
            [0.0, 0.3, -0.5],
            [-0.3, -0.3, -0.25],
            [0.6, 0.4, 0.1],
            [0.5, -0.3, -0.4],
            [-0.6, 0.0, -0.6],
            [0.95, 0.85, 0.1],
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    shading = 0.35 * (torch.sin(9 * u + 4 * v) * torch.cos(6 * v - 3 * u)) + 0.3 * (0.5 - v)
    noise = 0.1 * torch.randn(3, height, width, generator=generator)
    image = colours[labels].movedim(-1, 0) + 0.5 * shading + noise
    return image.clamp(-1, 1)[None], labels[None]


def to_rgb(x):
    """A (3, H, W) tensor in [-1, 1] as an (H, W, 3) array in [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1).movedim(0, -1).numpy()


def colours(count):
    """`count` distinct colours."""
    return plt.get_cmap("tab10" if count <= 10 else "tab20")(range(count))


def save(figure, name):
    figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
    plt.close(figure)
