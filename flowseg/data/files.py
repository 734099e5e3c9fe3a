"""Files of a folder and its sub-folders by suffix, and messages about files that are left out."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flowseg.errors import DataWarning, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
# Index files that Windows writes next to pictures.
_INDEX_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}


def list_files(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Sorted files below a folder that have one of the suffixes, and the other files.

    Hidden files and folders (with a leading dot), the index files of Windows, pipes and devices are in neither list. Every
    real sub-folder is visited once, even if several links lead to it.

    Raises:
        UserError: a folder cannot be listed.
    """
    found: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            facts = here.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = list(os.scandir(here))
        except OSError as error:
            raise UserError(f"{here}: cannot be listed ({error.strerror}); give a folder that can be read") from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _INDEX_FILES:
                continue
            path = here / entry.name
            if entry.is_dir():
                waiting.append(path)
            elif entry.is_symlink() or entry.is_file():
                (found if path.suffix.lower() in suffixes else others).append(path)
    return sorted(found), sorted(others)


def warn_of_other_suffixes(folder: Path, others: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Warn of files that are left out because of their suffix."""
    if others:
        warnings.warn(
            f"{folder}: {len(others)} files are left out because their suffix is none of {', '.join(suffixes)}: "
            f"{counts_by_suffix(others)}",
            DataWarning,
            stacklevel=3,
        )


def jpeg_label_hint(label: Path) -> str:
    """A hint to add to an error, if the missing label map exists as a JPEG; else an empty text."""
    for suffix in (".jpg", ".jpeg", ".JPG", ".JPEG"):
        if label.with_suffix(suffix).is_file():
            return (
                f" ({label.with_suffix(suffix).name} is there, but JPEG changes label values; save label maps as PNG)"
            )
    return ""


def counts_by_suffix(paths: Sequence[Path]) -> str:
    """The number of files of each suffix with an example, the most frequent suffix first."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.suffix.lower()].append(path)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    texts = [f"{len(some)} {suffix or 'without a suffix'} (such as {some[0].name})" for suffix, some in ordered[:5]]
    return ", ".join(texts) + ", ..." * (len(ordered) > 5)
