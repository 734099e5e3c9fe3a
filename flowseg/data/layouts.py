"""Where a data set keeps the images and label maps of a split, once it is unpacked."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from flowseg.data.files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    counts_by_suffix,
    jpeg_label_hint,
    list_files,
    warn_of_other_suffixes,
)
from flowseg.errors import DataWarning, UserError

Pair = tuple[Path, Path]


class Layout(NamedTuple):
    """How to find the files of a split.

    Attributes:
        find: ``(root, split)`` to pairs of image and label map, by name.
        expected: what the root must contain, with ``{split}`` for the split.
    """

    find: Callable[[Path, str], list[Pair]]
    expected: str


def find_pairs(layout: Layout, root: Path, split: str) -> list[Pair]:
    """Image and label files of a split, sorted by name.

    Hidden files are skipped. A :class:`DataWarning` names files that are left out because of their suffix or sub-folder, and
    label maps without an image.

    Args:
        layout: how the data set is laid out.
        root: folder of the data set.
        split: the data set's own name of the split, such as ``"training"`` for ADE20K.

    Raises:
        UserError: a missing folder, list or label map, two images of one name, or a split without images.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root {root}: no such folder; it must contain {layout.expected.format(split=split)}")
    pairs = layout.find(root, split)
    for image, label in pairs:
        if not label.is_file():
            raise UserError(f"{image}: no label map; wanted {label}{jpeg_label_hint(label)}")
    return pairs


def _folders(images: str, labels: str) -> Callable[[Path, str], list[Pair]]:
    """A finder for two folder trees with equal file names, each with one folder per split."""

    def find(root: Path, split: str) -> list[Pair]:
        folder, label_folder = _split_folder(root / images, split), root / labels / split
        found, others = list_files(folder, IMAGE_SUFFIXES)
        if not found:
            present = f"; there are only {counts_by_suffix(others)}" if others else ""
            raise UserError(f"{folder}: no images; put {', '.join(IMAGE_SUFFIXES)} files there{present}")
        maps = list_files(label_folder, LABEL_SUFFIXES)[0] if label_folder.is_dir() else []
        # A sub-folder without labels contains something else, such as thumbnails.
        strays = [
            path
            for path in found
            if path.parent != folder and not (label_folder / path.parent.relative_to(folder)).is_dir()
        ]
        if strays:
            reason = f"images in sub-folders that {label_folder} does not have"
            if len(strays) == len(found):
                raise UserError(
                    f"{folder}: contains only {reason}, such as {strays[0]}; give the label maps the same sub-folders"
                )
            warnings.warn(
                f"{folder}: {len(strays)} {reason} are left out, such as {strays[0]}", DataWarning, stacklevel=4
            )
        warn_of_other_suffixes(folder, others, IMAGE_SUFFIXES)
        return _pair_up(_by_name(found, folder, set(strays)), _by_name(maps, label_folder), folder, label_folder)

    return find


def _by_name(paths: list[Path], folder: Path, without: Collection[Path] = ()) -> dict[str, list[Path]]:
    """Files by their path below the folder without suffix, in composed Unicode: macOS decomposes accented letters."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        if path not in without:
            name = unicodedata.normalize("NFC", str(path.relative_to(folder).with_suffix("")))
            groups.setdefault(name, []).append(path)
    return groups


def _pair_up(
    images: dict[str, list[Path]], maps: dict[str, list[Path]], folder: Path, label_folder: Path
) -> list[Pair]:
    for kind, groups in (("images", images), ("label maps", {name: maps[name] for name in images if name in maps})):
        for same in groups.values():
            if len(same) > 1:
                raise UserError(f"{same[0]} and {same[1]}: two {kind} with the same name; remove or rename one of them")
    unused = [path for name, same in maps.items() if name not in images for path in same]
    if unused:
        warnings.warn(
            f"{label_folder}: label maps without an image in {folder}: {len(unused)}, such as {unused[0].name}",
            DataWarning,
            stacklevel=5,
        )

    def label_of(name: str, image: Path) -> Path:
        if name in maps:
            return maps[name][0]
        return label_folder / image.parent.relative_to(folder) / f"{image.stem}.png"

    return [(same[0], label_of(name, same[0])) for name, same in images.items()]


def _cityscapes(root: Path, split: str) -> list[Pair]:
    folder = _split_folder(root / "leftImg8bit", split)
    found = sorted(p for p in folder.glob("*/*_leftImg8bit.png") if not p.name.startswith("."))
    if not found:
        raise UserError(f"{folder}: no images; wanted CITY/*_leftImg8bit.png there")
    labels = root / "gtFine" / split
    return [
        (path, labels / path.parent.name / path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png"))
        for path in found
    ]


def _voc(root: Path, split: str) -> list[Pair]:
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        found = ", ".join(sorted(path.stem for path in listed.parent.glob("*.txt"))) or "none"
        raise UserError(f"data split {split!r}: no list {listed}; lists there: {found}")
    names = listed.read_text(encoding="utf-8-sig").split()
    if not names:
        raise UserError(f"{listed}: names no images")
    pairs = [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names]
    for image, _ in pairs:
        if not image.is_file():
            raise UserError(f"{image}: no such image; {listed} names it")
    return pairs


def _split_folder(parent: Path, split: str) -> Path:
    folder = parent / split
    if not folder.is_dir():
        found = sorted(path.name for path in parent.glob("*") if path.is_dir() and path.name[0] != ".")
        hint = f"found {', '.join(found)}" if found else f"{parent} has no sub-folders"
        raise UserError(f"data split {split!r}: no folder {folder}; {hint}")
    return folder


IMAGES_AND_LABELS = Layout(_folders("images", "labels"), "images/{split} and labels/{split}")
IMAGES_AND_ANNOTATIONS = Layout(_folders("images", "annotations"), "images/{split} and annotations/{split}")
CITYSCAPES = Layout(_cityscapes, "leftImg8bit/{split} and gtFine/{split}")
VOC = Layout(_voc, "JPEGImages, SegmentationClass and ImageSets/Segmentation/{split}.txt")
