"""The dtype and the ignored value of label maps: bytes up to 255 classes, more bits above."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_CLASSES = 65535
"""Largest number of classes: 16-bit label maps hold them and an ignored value."""


class LabelKind(NamedTuple):
    """How the label maps of a run are represented.

    Attributes:
        ignore: label of pixels without a class; no class has it.
        dtype: dtype of tensors. It is int32 where 8 bits do not suffice: torch supports few operations on uint16.
        array: dtype of NumPy arrays.
        mode: mode of Pillow images. ``I`` has 32 bits: some versions of Pillow cannot resize or paste ``I;16``.
        stored: dtype of written files.
    """

    ignore: int
    dtype: torch.dtype
    array: type[np.integer]
    mode: str
    stored: type[np.integer]


BYTES = LabelKind(255, torch.uint8, np.uint8, "L", np.uint8)
WORDS = LabelKind(65535, torch.int32, np.int32, "I", np.uint16)


def label_kind(classes: int) -> LabelKind:
    """The representation of label maps with a number of classes: ``BYTES`` up to 255, else ``WORDS``."""
    return BYTES if classes <= BYTES.ignore else WORDS


def kind_of(labels: Tensor | np.ndarray) -> LabelKind:
    """The representation of a label map, from its dtype."""
    return BYTES if labels.dtype.itemsize == 1 else WORDS
