"""One entry to every data set: pairs of both splits with the meaning of their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from flowseg.config import DataConfig
from flowseg.data import digits, paints
from flowseg.data.folder import FolderPairs
from flowseg.data.layouts import SPLITS, find_pairs
from flowseg.data.pictures import Reading
from flowseg.data.presets import PRESETS, Labels, spread_palette
from flowseg.errors import UserError

# Data that is made on the fly: its scenes and the smallest side they can have.
EMBEDDED = {"digits": (digits.DigitScenes, digits.CELL), "paints": (paints.PaintScenes, paints.SMALLEST)}


class Pairs(Protocol):
    """Anything that gives RGB images with 8-bit label maps."""

    names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]: ...


@dataclasses.dataclass
class SegmentationData:
    """The splits that were asked for (``None`` for the others) and the meaning of the labels."""

    labels: Labels
    train: Pairs | None
    val: Pairs | None

    @property
    def num_classes(self) -> int:
        return len(self.labels.classes)


def resolve_labels(config: DataConfig) -> Labels:
    """Class names, colours and ignored values of a run: the preset's, each replaced where the settings give their own.

    Raises:
        UserError: no class names for a folder, repeated names, or a palette of another length.
    """
    preset = PRESETS.get(config.name)
    if config.name in EMBEDDED and (config.classes or config.ignore or config.root or config.values):
        raise UserError(
            f"data.classes, data.values, data.ignore and data.root do not apply to {config.name}; set data.name=folder"
        )
    classes = config.classes or (preset.classes if preset else None)
    if not classes:
        raise UserError("data.classes is missing: list the class names in the order of the label values 0, 1, 2, ...")
    if len(set(classes)) != len(classes):
        repeated = next(name for name in classes if list(classes).count(name) > 1)
        raise UserError(f"data.classes: {repeated!r} is listed twice")
    if not 2 <= len(classes) <= 255:
        raise UserError(f"data.classes must hold 2 to 255 names, got {len(classes)}")
    ignore = config.ignore if config.ignore is not None else (preset.ignore if preset else ())
    values = preset.values if preset and preset.values and len(preset.values) == len(classes) else None
    if config.values is not None:
        values = _own_values(config.values, len(classes))
        # The values that a preset ignores may be classes here.
        ignore = ignore if config.ignore is not None else [value for value in ignore if value not in values]
    meaning = dict(zip(values or range(len(classes)), classes))
    taken = [value for value in ignore if value in meaning]
    if taken:
        raise UserError(f"data.ignore: value {taken[0]} is the class {meaning[taken[0]]!r}")
    palette = config.palette
    if palette is None:
        palette = preset.palette if preset and len(preset.palette) == len(classes) else spread_palette(len(classes))
    if len(palette) != len(classes):
        raise UserError(f"data.palette must hold one colour for each of {len(classes)} classes, got {len(palette)}")
    return Labels(tuple(classes), tuple(tuple(color) for color in palette), tuple(ignore), values)


def _own_values(values: list[int], classes: int) -> tuple[int, ...]:
    if len(values) != classes:
        raise UserError(f"data.values must hold one label value for each of {classes} classes, got {len(values)}")
    repeated = [value for value in values if values.count(value) > 1]
    if repeated:
        raise UserError(f"data.values: {repeated[0]} is listed twice; a label value can only mean one class")
    return tuple(values)


def open_data(
    config: DataConfig, splits: Sequence[str] = ("train", "val"), *, seed: int = 0, check: bool = True
) -> SegmentationData:
    """Open the configured data.

    Args:
        config: the data section.
        splits: any of ``"train"`` and ``"val"``.
        seed: of the embedded scenes; folders do not use it.
        check: look at the files now, as far as ``config.check`` says; of several processes one is enough.

    Raises:
        UserError: see :func:`find_pairs` and :class:`FolderPairs`.
    """
    labels = resolve_labels(config)
    opened: dict[str, Pairs] = {}
    for split in splits:
        if config.name in EMBEDDED:
            scenes, smallest = EMBEDDED[config.name]
            if min(config.height, config.width) < smallest:
                raise UserError(
                    f"data.height and data.width must be at least {smallest} for {config.name}, "
                    f"got {config.height}x{config.width}"
                )
            count = config.scenes_train if split == "train" else config.scenes_val
            opened[split] = scenes(split, count, config.height, config.width, seed)
        else:
            if config.root is None:
                raise UserError(f"data.root is missing: --root must name the folder of the {config.name} data")
            names = SPLITS.get(config.name, ("train", "val"))
            name = (config.train_split or names[0]) if split == "train" else (config.val_split or names[1])
            pairs = find_pairs(config.name, config.root, name)
            opened[split] = FolderPairs(
                pairs, labels, check=config.check if check else "none", reading=Reading.of(config)
            )
    return SegmentationData(labels, opened.get("train"), opened.get("val"))
