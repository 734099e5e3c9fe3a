"""Files of a folder and its sub-folders by suffix, and what is said about those that are left out."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flowseg.errors import DataWarning, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
# Systems put these beside pictures without being asked.
_RUBBISH = {"thumbs.db", "desktop.ini", "ehthumbs.db"}


def list_files(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Files with one of the suffixes under a folder, in order, and the other files.

    Hidden files and folders (a leading dot) are passed over, as are the index files of Windows, pipes and devices. Every
    real sub-folder is visited once, whatever links lead to it.

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
            if entry.name.startswith(".") or entry.name.lower() in _RUBBISH:
                continue
            path = here / entry.name
            if entry.is_dir():
                waiting.append(path)
            elif entry.is_symlink() or entry.is_file():
                (found if path.suffix.lower() in suffixes else others).append(path)
    return sorted(found), sorted(others)


def name_left_out(folder: Path, others: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Warn of files that were passed over for their suffix."""
    if others:
        warnings.warn(
            f"{folder}: {len(others)} files are left out, with other suffixes than {', '.join(suffixes)}: "
            f"{by_suffix(others)}",
            DataWarning,
            stacklevel=3,
        )


def by_suffix(paths: Sequence[Path]) -> str:
    """Numbers and an example of each suffix, the most frequent first."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.suffix.lower()].append(path)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    said = [f"{len(some)} {suffix or 'without a suffix'} (such as {some[0].name})" for suffix, some in ordered[:5]]
    return ", ".join(said) + ", ..." * (len(ordered) > 5)
