"""Where each data set keeps the images and label maps of a split, as it is unpacked."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

from flowseg.data.files import IMAGE_SUFFIXES, LABEL_SUFFIXES, by_suffix, list_files, name_left_out
from flowseg.errors import DataWarning, UserError

Pair = tuple[Path, Path]


def find_pairs(name: str, root: Path, split: str) -> list[Pair]:
    """Image and label files of a split, by name.

    Args:
        name: of the data set, a key of ``LAYOUTS``.
        root: its folder.
        split: the data set's own name of the split, e.g. ``"training"`` of ADE20K.

    Hidden files are passed over. A :class:`DataWarning` names files that are left out for their suffix or sub-folder, and
    label maps without an image.

    Raises:
        UserError: a folder, list or label map that is not there, named, two images of one name, or a split without images.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root {root}: no such folder; it should hold {LAYOUTS[name][1].format(split=split)}")
    pairs = LAYOUTS[name][0](root, split)
    for image, label in pairs:
        if not label.is_file():
            raise UserError(f"{image}: no label map; wanted {label}")
    return pairs


def _folders(images: str, labels: str) -> Callable[[Path, str], list[Pair]]:
    """Two trees with the same names, the split one level down in each."""

    def find(root: Path, split: str) -> list[Pair]:
        folder, label_folder = _split_folder(root / images, split), root / labels / split
        found, others = list_files(folder, IMAGE_SUFFIXES)
        if not found:
            there = f"; there are only {by_suffix(others)}" if others else ""
            raise UserError(f"{folder}: no images; put {', '.join(IMAGE_SUFFIXES)} files there{there}")
        maps = list_files(label_folder, LABEL_SUFFIXES)[0] if label_folder.is_dir() else []
        # A sub-folder without labels holds something else, such as thumbnails.
        strays = [
            path
            for path in found
            if path.parent != folder and not (label_folder / path.parent.relative_to(folder)).is_dir()
        ]
        if strays:
            said = f"images in sub-folders that {label_folder} does not have"
            if len(strays) == len(found):
                raise UserError(
                    f"{folder}: holds only {said}, such as {strays[0]}; give the label maps the same sub-folders"
                )
            warnings.warn(
                f"{folder}: {len(strays)} {said} are left out, such as {strays[0]}", DataWarning, stacklevel=4
            )
        name_left_out(folder, others, IMAGE_SUFFIXES)
        return _pair_up(_by_name(found, folder, set(strays)), _by_name(maps, label_folder), folder, label_folder)

    return find


def _by_name(paths: list[Path], folder: Path, without: Collection[Path] = ()) -> dict[str, list[Path]]:
    """Files by their place under the folder and their name without suffix; macOS decomposes accented letters."""
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
                raise UserError(
                    f"{same[0]} and {same[1]}: two {kind} of one name, which would be taken for one example; remove or "
                    "rename one"
                )
    lonely = [path for name, same in maps.items() if name not in images for path in same]
    if lonely:
        warnings.warn(
            f"{label_folder}: label maps without an image in {folder}: {len(lonely)}, such as {lonely[0].name}",
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


_IMAGES_AND_LABELS = (_folders("images", "labels"), "images/{split} and labels/{split}")
_IMAGES_AND_ANNOTATIONS = (_folders("images", "annotations"), "images/{split} and annotations/{split}")
LAYOUTS: dict[str, tuple[Callable[[Path, str], list[Pair]], str]] = {
    "folder": _IMAGES_AND_LABELS,
    "camvid": _IMAGES_AND_LABELS,
    "ade20k": _IMAGES_AND_ANNOTATIONS,
    "cocostuff": _IMAGES_AND_ANNOTATIONS,
    "cityscapes": (_cityscapes, "leftImg8bit/{split} and gtFine/{split}"),
    "voc": (_voc, "JPEGImages, SegmentationClass and ImageSets/Segmentation/{split}.txt"),
}

# What each data set calls its own training and validation splits.
SPLITS = {
    "ade20k": ("training", "validation"),
    "cocostuff": ("train2017", "val2017"),
}
