"""Generated data: scenes of bright handwritten digits over darkened crops of photographs.

Digits and photographs come with scikit-learn (``load_digits``, 1797 digits of 8x8 pixels; ``load_sample_images``, two
photographs), so nothing is downloaded. A scene is a function of (seed, split, index).
"""

from __future__ import annotations

import colorsys
import functools

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
# Training crops come from the left 70 % of a photograph, validation crops from the rest.
PHOTO_SPLIT = 0.7
# Every fifth digit is for validation.
VAL_EVERY = 5
# A scene is divided into square cells of this side in pixels, each with a digit near its middle.
CELL = 16
# Share of the cells that stay empty.
EMPTY = 0.3


class DigitScenes:
    """Scenes of 11 classes (background, 0..9); the splits share neither digits nor regions of photographs.

    Args:
        split: ``"train"`` or ``"val"``.
        count: number of scenes.
        height, width: size in pixels.
        seed: seed of the split.
    """

    def __init__(self, split: str, count: int, height: int, width: int, seed: int = 0):
        self.split, self.count, self.height, self.width, self.seed = split, count, height, width, seed
        self.names = [f"{split}-{index:06d}" for index in range(count)]
        self._digits, self._targets = _digits(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return an RGB image and its 8-bit label map."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        canvas = _background(rng, self.split, self.height, self.width)
        labels = np.zeros((self.height, self.width), np.uint8)
        for top in range(0, self.height - CELL + 1, CELL):
            for left in range(0, self.width - CELL + 1, CELL):
                if rng.uniform() < EMPTY:
                    continue
                which = rng.integers(len(self._digits))
                side = min(int(rng.integers(CELL - 2, CELL + 3)), self.height, self.width)
                mask = _draw(rng, self._digits[which], side)
                place = _jittered(rng, top, left, mask.shape[0], labels.shape)
                region = canvas[place]
                region[:] = region * (1 - mask[..., None]) + _bright(rng) * mask[..., None]
                labels[place][mask > 0.5] = 1 + self._targets[which]
        return Image.fromarray(canvas.round().astype(np.uint8)), Image.fromarray(labels)


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    is_val = np.arange(len(data.target)) % VAL_EVERY == 0
    keep = is_val if split == "val" else ~is_val
    return (data.images[keep] / 16.0).astype(np.float32), data.target[keep]


@functools.cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def _background(rng: np.random.Generator, split: str, height: int, width: int) -> np.ndarray:
    photographs = _photographs()
    photo = photographs[rng.integers(len(photographs))]
    edge = int(photo.shape[1] * PHOTO_SPLIT)
    photo = photo[:, edge:] if split == "val" else photo[:, :edge]
    largest = min(photo.shape[0] / height, photo.shape[1] / width)
    scale = rng.uniform(min(1.0, largest), min(2.5, largest))
    crop_h, crop_w = int(height * scale), int(width * scale)
    y = int(rng.integers(0, photo.shape[0] - crop_h + 1))
    x = int(rng.integers(0, photo.shape[1] - crop_w + 1))
    crop = Image.fromarray(photo[y : y + crop_h, x : x + crop_w]).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(crop, np.float32) * rng.uniform(0.3, 0.6)


def _draw(rng: np.random.Generator, digit: np.ndarray, side: int) -> np.ndarray:
    """Enlarge and rotate a digit and sharpen its edge; return its coverage ``(side, side)`` in [0, 1]."""
    image = Image.fromarray(np.pad(digit, 1) * 255.0).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-15, 15), resample=Image.Resampling.BICUBIC)
    return np.clip((np.asarray(image, np.float32) / 255.0 - 0.12) * 5.0, 0.0, 1.0)


def _jittered(rng: np.random.Generator, top: int, left: int, side: int, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Place of a square of ``side`` near the middle of a cell, inside the scene."""
    middle = (CELL - side) // 2
    y, x = (int(start + middle + rng.integers(-2, 3)) for start in (top, left))
    y, x = min(max(y, 0), shape[0] - side), min(max(x, 0), shape[1] - side)
    return slice(y, y + side), slice(x, x + side)


def _bright(rng: np.random.Generator) -> np.ndarray:
    """A random bright colour, RGB in 0..255."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.2, 0.8), 1.0), np.float32) * 255
