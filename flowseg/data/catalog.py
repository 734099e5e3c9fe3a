"""The table of data sets: meaning of their labels, places of their files, and names of their splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flowseg.data import digits, layouts, paints, presets
from flowseg.data.layouts import Layout
from flowseg.data.presets import Labels


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A data set that is generated.

    Attributes:
        make: ``(split, count, height, width, seed)`` to the pairs of a split.
        smallest: smallest height and width of a scene in pixels.
        labels_of: meaning of the labels for a chosen number of classes, which ``make`` then takes as ``num_classes``; ``None``
            if there is no choice.
    """

    make: Callable
    smallest: int
    labels_of: Callable[[int], Labels] | None = None


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Facts about a data set that is known by name.

    Attributes:
        labels: meaning of its label values; ``None`` if only the settings can tell.
        source: its files, or its generated scenes.
        splits: its own names of the training and the validation split.
    """

    labels: Labels | None
    source: Layout | Scenes
    splits: tuple[str, str] = ("train", "val")


DATA_SETS = {
    "digits": DataSet(presets.DIGITS, Scenes(digits.DigitScenes, digits.CELL)),
    "paints": DataSet(presets.PAINTS, Scenes(paints.PaintScenes, paints.SMALLEST, presets.paint_labels)),
    "camvid": DataSet(presets.CAMVID, layouts.IMAGES_AND_LABELS),
    "ade20k": DataSet(presets.ADE20K, layouts.IMAGES_AND_ANNOTATIONS, ("training", "validation")),
    "cocostuff": DataSet(presets.COCO_STUFF, layouts.IMAGES_AND_ANNOTATIONS, ("train2017", "val2017")),
    "cityscapes": DataSet(presets.CITYSCAPES, layouts.CITYSCAPES),
    "voc": DataSet(presets.VOC, layouts.VOC),
    "folder": DataSet(None, layouts.IMAGES_AND_LABELS),
}
"""Keys are those of ``flowseg.data_names.DATA_NAMES``."""
