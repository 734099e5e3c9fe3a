"""Generated data with many classes: scenes of striped regions. Each of the 48 classes is a paint.

A paint is a hue (red, orange, ...) that is pale or strong and dark or light. Every region gets a random colour within the
range of its paint, random stripes (direction, width, contrast) and noise. A scene is a function of (seed, split, index).
"""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "rose")
SATURATIONS = {"pale": 0.4, "strong": 0.9}
BRIGHTNESSES = {"dark": 0.45, "light": 0.85}
PAINTS = tuple(itertools.product(BRIGHTNESSES, SATURATIONS, HUES))
REGIONS = (3, 8)
"""Number of regions in a scene: at least the first number, less than the second."""
WAVELENGTH = (4.0, 12.0)
"""Smallest and largest distance between stripes in pixels."""
SMALLEST = 16
"""Smallest height and width of a scene in pixels."""


class PaintScenes:
    """Scenes of 48 classes. Each region contains the pixels nearest to one of 3 to 7 random points.

    Args:
        split: ``"train"`` or ``"val"``; their scenes are independent.
        count: number of scenes.
        height, width: size in pixels.
        seed: seed of the split.
    """

    def __init__(self, split: str, count: int, height: int, width: int, seed: int = 0):
        self.split, self.count, self.height, self.width, self.seed = split, count, height, width, seed
        self.names = [f"{split}-{index:06d}" for index in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return an RGB image and its 8-bit label map."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        points = rng.uniform((0, 0), (self.height, self.width), (rng.integers(*REGIONS), 2))
        cell = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
        canvas = np.empty((self.height, self.width, 3), np.float32)
        labels = np.empty((self.height, self.width), np.uint8)
        for place in range(len(points)):
            paint = int(rng.integers(len(PAINTS)))
            inside = cell == place
            labels[inside] = paint
            canvas[inside] = _painted(rng, paint, y[inside], x[inside])
        canvas += rng.normal(0.0, 0.06, canvas.shape)
        return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8)), Image.fromarray(labels)


def _painted(rng: np.random.Generator, paint: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Colours ``(N, 3)`` of the pixels of one region, about in [0, 1]."""
    brightness, saturation, hue = PAINTS[paint]
    color = colorsys.hsv_to_rgb(
        (HUES.index(hue) + rng.uniform(-0.4, 0.4)) / len(HUES) % 1.0,
        SATURATIONS[saturation] + rng.uniform(-0.1, 0.1),
        BRIGHTNESSES[brightness] + rng.uniform(-0.1, 0.1),
    )
    angle = rng.uniform(0, np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / rng.uniform(*WAVELENGTH))
    wave = 1 + rng.uniform(0.1, 0.4) * np.sin(along + rng.uniform(0, 2 * np.pi))
    return wave[:, None] * np.array(color, np.float32)
