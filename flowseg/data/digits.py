"""Embedded data: scenes of real handwritten digits over crops of real photographs, made on the fly.

Both come with scikit-learn (`load_digits`, 1797 digits of 8x8 pixels; `load_sample_images`, two photographs), so
nothing is downloaded. A scene depends on (seed, split, index) alone.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
# A photograph is divided at this share of its width: train crops come from the left part, val crops from the right.
PHOTO_SPLIT = 0.7
VAL_EVERY = 5


class DigitScenes:
    """``K = 11`` (background, 0..9) scenes; train and val share neither digits nor photograph regions.

    Args:
        split: ``"train"`` or ``"val"``.
        count: number of scenes.
        height, width: pixels.
        seed: of the whole split.
    """

    def __init__(self, split: str, count: int, height: int, width: int, seed: int = 0):
        self.split, self.count, self.height, self.width, self.seed = split, count, height, width, seed
        self.names = [f"{split}-{index:06d}" for index in range(count)]
        self._digits, self._targets = _digits(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """RGB image and 8-bit label map."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        canvas = _background(rng, self.split, self.height, self.width)
        labels = np.zeros((self.height, self.width), np.uint8)
        side = min(self.height, self.width)
        for _ in range(rng.integers(2, 5)):
            which = rng.integers(len(self._digits))
            mask = _draw(rng, self._digits[which], int(side * rng.uniform(0.38, 0.55)))
            color = _contrasting(rng, canvas.mean(axis=(0, 1)))
            place = _free_place(rng, labels, mask)
            if place is not None:
                region = canvas[place]
                region[:] = region * (1 - mask[..., None]) + color * mask[..., None]
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
    return np.asarray(crop, np.float32) * rng.uniform(0.5, 1.0)


def _draw(rng: np.random.Generator, digit: np.ndarray, side: int) -> np.ndarray:
    """One digit as a coverage mask ``(side, side)`` in [0, 1]: enlarged, rotated, with a sharpened edge."""
    image = Image.fromarray(np.pad(digit, 1) * 255.0).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-20, 20), resample=Image.Resampling.BICUBIC)
    return np.clip((np.asarray(image, np.float32) / 255.0 - 0.25) * 4.0, 0.0, 1.0)


def _free_place(rng: np.random.Generator, labels: np.ndarray, mask: np.ndarray) -> tuple[slice, slice] | None:
    """A place where the digit covers no other, or ``None`` after some tries."""
    height, width = mask.shape
    for _ in range(20):
        y = int(rng.integers(0, labels.shape[0] - height + 1))
        x = int(rng.integers(0, labels.shape[1] - width + 1))
        place = slice(y, y + height), slice(x, x + width)
        if not (labels[place][mask > 0.1] > 0).any():
            return place
    return None


def _contrasting(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour at least 120 away (Euclidean, of 442) from the mean background."""
    while True:
        color = rng.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(color - background) > 120:
            return color
