"""Open any data set: the pairs of its splits, with the meaning of their labels."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from flowseg.config import DataConfig
from flowseg.data.catalog import DATA_SETS, Scenes
from flowseg.data.folder import FolderPairs
from flowseg.data.layouts import find_pairs
from flowseg.data.pictures import Reading
from flowseg.data.presets import Labels, spread_palette
from flowseg.errors import UserError
from flowseg.label_kinds import MOST_CLASSES


class Pairs(Protocol):
    """A sequence of RGB images with their label maps: of mode ``L``, or of mode ``I`` with more than 255 classes."""

    names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]: ...


@dataclasses.dataclass
class SegmentationData:
    """Opened splits (``None`` for a split that was not asked for) and the meaning of their labels."""

    labels: Labels
    train: Pairs | None
    val: Pairs | None

    @property
    def num_classes(self) -> int:
        return len(self.labels.classes)


def resolve_labels(config: DataConfig) -> Labels:
    """Class names, colours and label values of a run: those of the settings, else those known for the data set.

    Raises:
        UserError: no class names for a folder, repeated names, or a list whose length does not fit the classes.
    """
    data_set = DATA_SETS[config.name]
    preset = data_set.labels
    if config.num_classes is not None:
        choose = data_set.source.labels_of if isinstance(data_set.source, Scenes) else None
        if choose is None:
            raise UserError(
                f"data.num_classes chooses the classes of paints; {config.name} has its own, remove data.num_classes"
            )
        preset = choose(config.num_classes)
    if isinstance(data_set.source, Scenes) and (config.classes or config.ignore or config.root or config.values):
        raise UserError(
            f"data.classes, data.values, data.ignore and data.root do not apply to {config.name}; set data.name=folder"
        )
    classes = config.classes or (preset.classes if preset else None)
    if not classes:
        raise UserError(
            "data.classes is missing: list the class names in the order of the label values 0, 1, 2, ..., "
            "such as --set 'data.classes=[background, object]', or name a text file with one name per line"
        )
    repeated = _first_repeated(classes)
    if repeated is not None:
        raise UserError(f"data.classes: {repeated!r} is listed twice")
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise UserError(f"data.classes must list 2 to {MOST_CLASSES} names, got {len(classes)}")
    ignore = config.ignore if config.ignore is not None else (preset.ignore if preset else ())
    values = preset.values if preset and preset.values and len(preset.values) == len(classes) else None
    if config.values is not None:
        values = _checked_values(config.values, len(classes))
        # These settings may use a value as a class that the preset ignores.
        used = set(values)
        ignore = ignore if config.ignore is not None else [value for value in ignore if value not in used]
    class_of = dict(zip(values or range(len(classes)), classes))
    taken = [value for value in ignore if value in class_of]
    if taken:
        hint = (
            f"; give each class its value with data.values, such as [1-{len(classes)}]"
            if taken == [0] and not values
            else ""
        )
        raise UserError(f"data.ignore: value {taken[0]} is the class {class_of[taken[0]]!r}{hint}")
    palette = config.palette
    if palette is None:
        palette = preset.palette if preset and len(preset.palette) == len(classes) else spread_palette(len(classes))
    if len(palette) != len(classes):
        raise UserError(f"data.palette must list one colour for each of {len(classes)} classes, got {len(palette)}")
    return Labels(tuple(classes), tuple(tuple(color) for color in palette), tuple(ignore), values)


def _checked_values(values: list[int], classes: int) -> tuple[int, ...]:
    if len(values) != classes:
        raise UserError(f"data.values must list one label value for each of {classes} classes, got {len(values)}")
    repeated = _first_repeated(values)
    if repeated is not None:
        raise UserError(f"data.values: {repeated} is listed twice; a label value can only mean one class")
    return tuple(values)


def _first_repeated(items: Sequence) -> object | None:
    """The first item that occurs more than once, or ``None``."""
    counts = collections.Counter(items)
    return next((item for item in items if counts[item] > 1), None)


def open_data(
    config: DataConfig, splits: Sequence[str] = ("train", "val"), *, seed: int = 0, check: bool = True
) -> SegmentationData:
    """Open the configured data.

    Args:
        config: the data section.
        splits: any of ``"train"`` and ``"val"``.
        seed: seed of generated scenes; data on disk does not use it.
        check: check the files now, as thoroughly as ``config.check`` says. Among several processes one check is enough.

    Raises:
        UserError: see :func:`find_pairs` and :class:`FolderPairs`.
    """
    labels = resolve_labels(config)
    opened = {split: _open_split(config, labels, split, seed, check) for split in splits}
    return SegmentationData(labels, opened.get("train"), opened.get("val"))


def _open_split(config: DataConfig, labels: Labels, split: str, seed: int, check: bool) -> Pairs:
    data_set = DATA_SETS[config.name]
    if isinstance(data_set.source, Scenes):
        if min(config.height, config.width) < data_set.source.smallest:
            raise UserError(
                f"data.height and data.width must be at least {data_set.source.smallest} for {config.name}, "
                f"got {config.height}x{config.width}"
            )
        count = config.scenes_train if split == "train" else config.scenes_val
        chosen = {} if config.num_classes is None else {"num_classes": config.num_classes}
        return data_set.source.make(split, count, config.height, config.width, seed, **chosen)
    if config.root is None:
        raise UserError(f"data.root is missing: --root must name the folder of the {config.name} data")
    usual_train, usual_val = data_set.splits
    name = (config.train_split or usual_train) if split == "train" else (config.val_split or usual_val)
    pairs = find_pairs(data_set.source, config.root, name)
    return FolderPairs(pairs, labels, check=config.check if check else "none", reading=Reading.of(config))
