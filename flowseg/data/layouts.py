"""Where each data set keeps the images and label maps of a split, as it is unpacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flowseg.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
Pair = tuple[Path, Path]


def find_pairs(name: str, root: Path, split: str) -> list[Pair]:
    """Image and label files of a split, by name.

    Args:
        name: of the data set, a key of ``LAYOUTS``.
        root: its folder.
        split: the data set's own name of the split, e.g. ``"training"`` of ADE20K.

    Raises:
        UserError: a folder, list or label map that is not there, named, or a split without images.
    """
    root = Path(root)
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
        folder = _split_folder(root / images, split)
        found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        return [(path, root / labels / split / f"{path.stem}.png") for path in _some(found, folder)]

    return find


def _cityscapes(root: Path, split: str) -> list[Pair]:
    folder = _split_folder(root / "leftImg8bit", split)
    found = _some(list(folder.glob("*/*_leftImg8bit.png")), folder)
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
        found = sorted(path.name for path in parent.glob("*") if path.is_dir())
        hint = f"found {', '.join(found)}" if found else f"{parent} has no sub-folders"
        raise UserError(f"data split {split!r}: no folder {folder}; {hint}")
    return folder


def _some(paths: list[Path], folder: Path) -> list[Path]:
    if not paths:
        raise UserError(f"{folder}: no images; put .jpg or .png files there")
    return sorted(paths)


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
