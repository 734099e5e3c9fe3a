"""Pairs of image files and label maps on disk, checked when opened."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flowseg.codes import IGNORE_INDEX
from flowseg.data.layouts import IMAGE_SUFFIXES, Pair
from flowseg.data.presets import Labels
from flowseg.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "FolderPairs", "read_image"]

# Sets up to this size have every label map decoded at the start; of larger ones only the headers are read.
FULL_CHECK = 6000
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class FolderPairs:
    """Image and label pairs of one split.

    Args:
        pairs: files of each example.
        labels: meaning of the values; values in ``labels.ignore`` and 255 become 255.
        check: ``"full"`` decodes every label map now, ``"headers"`` reads the sizes, ``"none"`` nothing: training should
            not fail at the last file of an epoch. ``None``: full up to ``FULL_CHECK`` pairs, then headers.

    Raises:
        UserError: naming the file and what is wrong with it, now or when it is read.
    """

    def __init__(self, pairs: Sequence[Pair], labels: Labels, *, check: str | None = None):
        self.images = [image for image, _ in pairs]
        self.labels = [label for _, label in pairs]
        self.names = [image.stem for image in self.images]
        self._table = _value_table(labels)
        self._wanted = _describe(labels)
        check = check or ("full" if len(pairs) <= FULL_CHECK else "headers")
        if check != "none":
            # Decoding releases the interpreter's lock.
            with ThreadPoolExecutor() as pool:
                for _ in pool.map(lambda index: self._check(index, check == "full"), range(len(self))):
                    pass

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """RGB image and 8-bit label map with values in ``[0, K)`` or 255, both at native size."""
        image = read_image(self.images[index])
        return image, Image.fromarray(self._classes(index, image.size))

    def _classes(self, index: int, size: tuple[int, int]) -> np.ndarray:
        path = self.labels[index]
        values = _read_labels(path)
        _same_size(path, values.shape[::-1], size)
        classes = self._table[values]
        if classes.min(initial=0) < 0:
            unknown = np.unique(values[classes < 0]).tolist()
            raise UserError(
                f"{path}: label values {', '.join(map(str, unknown[:8]))} are neither a class ({self._wanted}) nor "
                f"ignored; name more classes in data.classes or list them in data.ignore"
            )
        return classes.astype(np.uint8)

    def _check(self, index: int, full: bool) -> None:
        # The header is enough for an image's size; a full decode happens when it is trained on.
        size = _size(self.images[index], "an image")
        if full:
            self._classes(index, size)
        else:
            _same_size(self.labels[index], _size(self.labels[index], "a label map"), size)


def read_image(path: Path, *, upright: bool = False) -> Image.Image:
    """An RGB image; grey, palette and alpha images are converted, 16 bits a pixel become 8.

    Args:
        path: the file.
        upright: turn it as the camera noted (EXIF). Images with label maps are not turned: their labels are not either.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image) if upright else image
            if picture.mode.startswith("I;16") or picture.mode == "I":
                # Pillow's own conversion would take everything above 255 for white.
                values = np.asarray(picture).clip(0, 65535)
                picture = Image.fromarray((values >> 8).astype(np.uint8))
            return picture.convert("RGB")
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _size(path: Path, kind: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read as {kind} ({error})") from None


def _same_size(path: Path, labels: tuple[int, int], image: tuple[int, int]) -> None:
    if labels != image:
        raise UserError(
            f"{path}: label map is {labels[0]}x{labels[1]} but its image is {image[0]}x{image[1]}; "
            f"both must have the same size"
        )


def _read_labels(path: Path) -> np.ndarray:
    """Values ``(H, W)``; of a palette picture the indices, never its colours."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read as a label map ({error})") from None
    if values.ndim != 2:
        raise UserError(
            f"{path}: label map must have one channel of class indices, got {values.shape[-1]} (mode {image.mode})"
        )
    if values.dtype.kind not in "bui" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise UserError(f"{path}: label values must be whole numbers in 0..65535 (mode {image.mode})")
    return values.astype(np.uint16)


def _value_table(labels: Labels) -> np.ndarray:
    """Label value (0..65535) to class; 255 for ignored, -1 for unknown."""
    table = np.full(65536, -1, np.int16)
    table[[IGNORE_INDEX, *labels.ignore]] = IGNORE_INDEX
    values = labels.values or range(len(labels.classes))
    table[list(values)] = np.arange(len(labels.classes))
    return table


def _describe(labels: Labels) -> str:
    values = labels.values or tuple(range(len(labels.classes)))
    consecutive = values[-1] - values[0] == len(values) - 1
    return f"{values[0]}..{values[-1]}" if consecutive else f"{len(values)} values in {values[0]}..{values[-1]}"
