"""A folder of images and label maps: ``images/SPLIT/NAME.{jpg,jpeg,png}`` and ``labels/SPLIT/NAME.png``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flowseg.codes import IGNORE_INDEX
from flowseg.data.presets import Labels
from flowseg.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderPairs:
    """Image and label pairs of one split, checked file by file when opened.

    Args:
        root: folder that holds ``images`` and ``labels``.
        split: sub-folder of both.
        labels: names of the values; values in ``labels.ignore`` and 255 become 255.
        check: read every file now; training should not fail at the last file of an epoch.

    Raises:
        UserError: naming the folder or file and what is wrong with it.
    """

    def __init__(self, root: Path, split: str, labels: Labels, *, check: bool = True):
        root = Path(root)
        folder = root / "images" / split
        if not root.is_dir():
            raise UserError(f"data.root {root}: no such folder; it should hold images/{split} and labels/{split}")
        if not folder.is_dir():
            found = sorted(p.name for p in (root / "images").glob("*") if p.is_dir())
            hint = f"found {', '.join(found)}" if found else f"{root / 'images'} has no sub-folders"
            raise UserError(f"data split {split!r}: no folder {folder}; {hint}")
        self.images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.images:
            raise UserError(f"{folder}: no images; put .jpg or .png files there")
        self.labels = [root / "labels" / split / f"{image.stem}.png" for image in self.images]
        for image, label in zip(self.images, self.labels):
            if not label.is_file():
                raise UserError(f"{image}: no label map; wanted {label}")
        self.names = [image.stem for image in self.images]
        self._table = _value_table(labels)
        self._num_classes = len(labels.classes)
        if check:
            for index in range(len(self)):
                self._check(index)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """RGB image and 8-bit label map with values in ``[0, K)`` or 255, both at native size."""
        image = read_image(self.images[index])
        return image, Image.fromarray(self._table[_read_labels(self.labels[index])].astype(np.uint8))

    def _check(self, index: int) -> None:
        # The header is enough for an image's size; a full decode happens when it is trained on.
        path = self.images[index]
        try:
            with Image.open(path) as image:
                size = image.size
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path}: cannot be read as an image ({error})") from None
        values = _read_labels(self.labels[index])
        if size != values.shape[::-1]:
            raise UserError(
                f"{self.labels[index]}: label map is {values.shape[1]}x{values.shape[0]} but its image is "
                f"{size[0]}x{size[1]}; both must have the same size"
            )
        unknown = sorted(set(np.unique(values[self._table[values] < 0]).tolist()))
        if unknown:
            shown = ", ".join(map(str, unknown[:8]))
            raise UserError(
                f"{self.labels[index]}: label values {shown} are neither a class (0..{self._num_classes - 1}) nor "
                f"ignored; name more classes in data.classes or list them in data.ignore"
            )


def read_image(path: Path) -> Image.Image:
    """An RGB image; grey, palette and alpha images are converted.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _read_labels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as a label map ({error})") from None
    if values.ndim != 2:
        raise UserError(
            f"{path}: label map must have one channel of class indices, got {values.shape[-1]} (mode {image.mode})"
        )
    return values.astype(np.int64)


def _value_table(labels: Labels) -> np.ndarray:
    """Label value (0..65535) to class; 255 for ignored, -1 for unknown."""
    table = np.full(65536, -1, np.int64)
    table[: len(labels.classes)] = np.arange(len(labels.classes))
    table[[IGNORE_INDEX, *labels.ignore]] = IGNORE_INDEX
    return table
