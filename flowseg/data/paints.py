"""Generated data with many classes: scenes of regions in patterns. Each of the first 48 classes is a paint.

A paint is a hue (red, orange, ...) that is pale or strong and dark or light. Every region gets a random colour within the
range of its paint, random stripes (direction, width, contrast) and noise. A scene is a function of (seed, split, index).

With more than 48 classes there are more colours, and the pattern becomes part of the class: ``flowseg.data.paint_classes``.
"""

from __future__ import annotations

import colorsys
import functools
import itertools

import numpy as np
from PIL import Image

from flowseg.data.paint_classes import textured, textured_names
from flowseg.label_kinds import label_kind

SPLITS = ("train", "val")
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "rose")
SATURATIONS = {"pale": 0.4, "strong": 0.9}
BRIGHTNESSES = {"dark": 0.45, "light": 0.85}
PAINTS = tuple(itertools.product(BRIGHTNESSES, SATURATIONS, HUES))
REGIONS = (3, 8)
"""Number of regions in a scene: at least the first number, less than the second."""
DEALT_REGIONS = (9, 18)
"""The same for scenes whose classes are dealt: the more regions, the sooner a network has seen every class."""
WAVELENGTH = (4.0, 12.0)
"""Smallest and largest distance between stripes in pixels."""
SMALLEST = 16
"""Smallest height and width of a scene in pixels."""


class PaintScenes:
    """Scenes of regions of different classes. A region contains the pixels nearest to one of some random points.

    With up to 48 classes, a scene has 3 to 7 regions, and every region has a random class. With more, a scene has 9 to 17, 13 on
    average, and the classes are dealt like cards: each occurs once in ``num_classes`` consecutive regions of the split.

    Args:
        split: ``"train"`` or ``"val"``; their scenes are independent.
        count: number of scenes.
        height, width: size in pixels.
        seed: seed of the split.
        num_classes: number of classes, 2 to 65,535.
    """

    def __init__(self, split: str, count: int, height: int, width: int, seed: int = 0, num_classes: int = len(PAINTS)):
        self.split, self.count, self.height, self.width, self.seed = split, count, height, width, seed
        self.num_classes = num_classes
        self.names = [f"{split}-{index:06d}" for index in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return an RGB image and its label map: of mode ``L``, or of mode ``I`` with more than 255 classes."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        dealt = self.num_classes > len(PAINTS)
        points = rng.uniform(
            (0, 0), (self.height, self.width), (_regions(index) if dealt else rng.integers(*REGIONS), 2)
        )
        cell = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
        canvas = np.empty((self.height, self.width, 3), np.float32)
        labels = np.empty((self.height, self.width), label_kind(self.num_classes).array)
        for place in range(len(points)):
            inside = cell == place
            if dealt:
                label = self._dealt(index, place)
                canvas[inside] = textured(rng, label, self.num_classes, y[inside], x[inside])
            else:
                label = int(rng.integers(self.num_classes))
                canvas[inside] = _painted(rng, label, y[inside], x[inside])
            labels[inside] = label
        canvas += rng.normal(0.0, 0.06, canvas.shape)
        return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8)), Image.fromarray(labels)

    def _dealt(self, index: int, place: int) -> int:
        """The class of a region: regions of consecutive scenes get the classes of one shuffled deck after the other."""
        before = sum(map(_regions, range(index % _CYCLE))) + index // _CYCLE * sum(map(_regions, range(_CYCLE)))
        deck, card = divmod(before + place, self.num_classes)
        return int(_deck(self.seed, SPLITS.index(self.split), deck, self.num_classes)[card])


_CYCLE = DEALT_REGIONS[1] - DEALT_REGIONS[0]


def _regions(index: int) -> int:
    """Number of regions of a scene whose classes are dealt."""
    return DEALT_REGIONS[0] + index % _CYCLE


@functools.lru_cache(maxsize=8)
def _deck(seed: int, split: int, number: int, count: int) -> np.ndarray:
    # Scenes use the keys (seed, split, index), which mean the same as (seed, split, index, 0).
    return np.random.default_rng((seed, split, number, 1)).permutation(count)


def class_names(num_classes: int) -> tuple[str, ...]:
    """Names of the classes, such as "dark pale red"."""
    if num_classes > len(PAINTS):
        return textured_names(num_classes)
    return tuple(" ".join(words) for words in PAINTS[:num_classes])


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
