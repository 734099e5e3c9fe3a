"""Pairs of image files and label maps on disk, checked when they are opened."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from flowseg.data.files import IMAGE_SUFFIXES
from flowseg.data.layouts import Pair
from flowseg.data.pictures import (
    LARGE_PIXELS,
    Reading,
    Shape,
    bands,
    read_picture,
    read_shape,
    read_values,
    turn_back,
    turn_of_labels,
    turn_values,
    value_counts,
)
from flowseg.data.presets import Labels
from flowseg.errors import DataWarning, UserError
from flowseg.label_kinds import BYTES, label_kind
from flowseg.runs.machine import usable_cores

__all__ = ["IMAGE_SUFFIXES", "FolderPairs", "read_image"]

# Up to this many pairs, the check decodes every label map; with more pairs it reads only headers.
FULL_CHECK = 6000


class FolderPairs:
    """Image and label pairs of one split.

    Args:
        pairs: image and label map of each example.
        labels: meaning of the label values. 255 (65535 with more than 255 classes) and the values in ``labels.ignore``
            become the ignored label, unless they are the value of a class.
        check: what to read now, so that training does not fail at the last file of an epoch: ``"full"`` decodes every label
            map, ``"headers"`` reads the sizes, ``"none"`` nothing. ``None``: full up to ``FULL_CHECK`` pairs, else headers.
        reading: how files are read.

    Attributes:
        meaning: ``labels``.
        counts: pixels per label value, ``(65536,)`` int64; ``None`` unless the check decoded every label map.

    Raises:
        UserError: a file that cannot be used, now or when it is read; the message names it.
    """

    def __init__(
        self, pairs: Sequence[Pair], labels: Labels, *, check: str | None = None, reading: Reading | None = None
    ):
        self.images = [image for image, _ in pairs]
        self.labels = [label for _, label in pairs]
        self.names = [image.stem for image in self.images]
        self.meaning = labels
        self.counts: np.ndarray | None = None
        self._reading = reading or Reading()
        self._kind = label_kind(len(labels.classes))
        self._table = _value_table(labels)
        self._labels = self._table.astype(self._kind.array)
        # Tables of bytes for label maps of 8 bits: Pillow applies them in a quarter of the time of NumPy's indexing.
        self._classes = self._table[:256].astype(np.uint8).tolist()
        self._unknown = (self._table[:256] < 0).tolist()
        self._wanted = _describe(labels)
        self._checked = check or ("full" if len(pairs) <= FULL_CHECK else "headers")
        if self._checked != "none":
            self._check_all()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return an RGB image and its label map, at native size and upright.

        The label map has values in ``[0, K)`` or the ignored value. Its mode is ``L``, or ``I`` with more than 255 classes.
        """
        image, shape = read_picture(self.images[index], self._reading)
        values = self._values(index, shape)
        if values.dtype == np.uint8 and self._kind is BYTES:
            picture = Image.fromarray(values)
            if np.asarray(picture.point(self._unknown)).any():
                self._check_values(index, value_counts(values))
            return image, picture.point(self._classes)
        self._check_values(index, value_counts(values))
        classes = np.empty(values.shape, self._kind.array)
        for source, target in zip(bands(values), bands(classes)):
            target[:] = self._labels[source]
        return image, Image.fromarray(classes)

    def pixels(self, index: int) -> int:
        """Number of pixels of an image, from the header of its file."""
        return math.prod(read_shape(self.images[index], "an image", self._reading).stored)

    def label_counts(self, index: int) -> np.ndarray:
        """Pixels per label value in one label map, ``(65536,)`` int64; the image is not read."""
        return value_counts(read_values(self.labels[index], self._reading)[0])

    def _values(self, index: int, image: Shape) -> np.ndarray:
        """Label values, turned to match the upright image."""
        path = self.labels[index]
        values, shape = read_values(path, self._reading)
        turn = turn_of_labels(path, shape, image, self._reading.exif)
        return values if shape.orientation != 1 else turn_values(values, turn)

    def _check_values(self, index: int, counts: np.ndarray) -> None:
        present = np.flatnonzero(counts)
        unknown = present[self._table[present] < 0].tolist()
        if unknown:
            last = len(self.meaning.classes)
            from_one = (
                f" (if 0 means no class, data.values=[1-{last}] and data.ignore=[0])" if unknown == [last] else ""
            )
            raise UserError(
                f"{self.labels[index]}: label values {', '.join(map(str, unknown[:8]))} are neither a class "
                f"({self._wanted}) nor ignored; name more classes in data.classes, give each class its value with "
                f"data.values{from_one}, or list values in data.ignore"
            )

    def _check_all(self) -> None:
        large = threading.Lock()
        total = np.zeros(65536, np.int64)
        unsure: list[Path] = []
        # Threads suffice: decoding releases the GIL.
        with ThreadPoolExecutor(min(8, usable_cores() + 1)) as pool:
            for index, (shape, found) in enumerate(pool.map(lambda index: self._check(index, large), range(len(self)))):
                if shape.orientation != 1 and shape.upright == shape.stored:
                    unsure.append(self.images[index])
                values, counts = found
                total[values] += counts
        if self._checked == "full":
            self.counts = total
        if unsure and self._reading.exif == "upright":
            warnings.warn(
                f"{len(unsure)} of {len(self)} images, such as {unsure[0]}, have an EXIF orientation that the sizes of "
                "their labels cannot confirm; we assume that the labels were drawn on what a viewer shows; if they were "
                "drawn on the stored pixels, set data.exif=stored",
                DataWarning,
                stacklevel=2,
            )

    def _check(self, index: int, large: threading.Lock) -> tuple[Shape, tuple[np.ndarray, np.ndarray]]:
        """Check one pair. Return the shape of the image, and the label values with their counts if the check is full."""
        # The header of the image suffices; training decodes it.
        shape = read_shape(self.images[index], "an image", self._reading)
        label = read_shape(self.labels[index], "a label map", self._reading)
        none = np.zeros(0, np.int64)
        with large if math.prod(label.stored) > LARGE_PIXELS else contextlib.nullcontext():
            try:
                turn_of_labels(self.labels[index], label, shape, self._reading.exif)
            except UserError:
                # The orientation of a PNG file may be stored after its pixels: decode both files and compare again.
                shape = read_picture(self.images[index], self._reading)[1]
                label = read_values(self.labels[index], self._reading)[1]
                turn_of_labels(self.labels[index], label, shape, self._reading.exif)
            if self._checked != "full":
                return shape, (none, none)
            counts = value_counts(self._values(index, shape))
        self._check_values(index, counts)
        values = np.flatnonzero(counts)
        return shape, (values, counts[values])


def read_image(path: Path, *, upright: bool = False, reading: Reading | None = None) -> Image.Image:
    """Read an RGB image; other modes and depths are converted (see :func:`read_picture`).

    Args:
        path: the file.
        upright: turn the image by its EXIF orientation, as training, evaluation and prediction do.
        reading: how files are read.

    Raises:
        UserError: the file cannot be decoded.
    """
    image, shape = read_picture(path, reading or Reading())
    return image if upright else turn_back(image, shape.orientation)


def _value_table(labels: Labels) -> np.ndarray:
    """Table from label value (0..65535) to class index; the ignored label for ignored values, -1 for unknown ones."""
    ignored = label_kind(len(labels.classes)).ignore
    table = np.full(65536, -1, np.int32)
    table[[ignored, *labels.ignore]] = ignored
    values = labels.values or range(len(labels.classes))
    table[list(values)] = np.arange(len(labels.classes))
    return table


def _describe(labels: Labels) -> str:
    values = labels.values or tuple(range(len(labels.classes)))
    consecutive = list(values) == list(range(values[0], values[-1] + 1))
    return f"{values[0]}..{values[-1]}" if consecutive else f"{len(values)} values in {min(values)}..{max(values)}"
