"""A table of the label values in the data of a run, shown before training, and warnings about suspicious values."""

from __future__ import annotations

import dataclasses
import time
import warnings

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowseg.data.class_names import COCO_STUFF_UNUSED
from flowseg.data.datasets import SegmentationData
from flowseg.data.folder import FolderPairs
from flowseg.data.presets import Labels
from flowseg.errors import DataWarning, UserError
from flowseg.label_kinds import BYTES, label_kind

# If the check did not decode every label map, count values in at most this many of them, for at most this long.
SAMPLE, SECONDS = 200, 20.0
# A table of more classes shows only the most and the least frequent ones.
_MOST_ROWS = 40


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Pixel counts of the label values of one split.

    Attributes:
        split: ``"train"`` or ``"val"``.
        counts: pixels per label value, ``(65536,)`` int64.
        counted: number of label maps that were counted.
        maps: number of label maps of the split.
    """

    split: str
    counts: np.ndarray
    counted: int
    maps: int

    @property
    def where(self) -> str:
        """Name of the split, and how much of it was counted."""
        part = "" if self.counted == self.maps else f" (in {self.counted} of {self.maps} label maps)"
        return f"{self.split}{part}"

    def share(self, values: np.ndarray | list[int]) -> float:
        """Percentage of pixels that have one of the values."""
        return 100 * float(self.counts[values].sum()) / max(int(self.counts.sum()), 1)


def tell_labels(data: SegmentationData, name: str, console: Console | None) -> None:
    """Show a table of the label values, and warn of values that are probably a mistake.

    A split is sampled if the check did not decode all its label maps. Generated data is not counted.

    Args:
        data: opened splits.
        name: name of the data set (``data.name`` of the settings).
        console: prints the table and the warnings; without a console each warning is a :class:`DataWarning`.

    Raises:
        UserError: every training label is ignored, or a label map cannot be read.
    """
    splits = [("train", data.train), ("val", data.val)]
    found = [count_labels(pairs, split) for split, pairs in splits if isinstance(pairs, FolderPairs)]
    if not found:
        return
    if console:
        console.print(_table(data.labels, found))
    for message in findings(data.labels, name, found):
        if console:
            console.print(Text.assemble(("warning: ", "yellow"), message), soft_wrap=True)
        else:
            warnings.warn(message, DataWarning, stacklevel=2)


def count_labels(pairs: FolderPairs, split: str) -> SplitCounts:
    """Count the label values of a split: use the counts of its check, or count up to ``SAMPLE`` evenly spread label maps."""
    if pairs.counts is not None:
        return SplitCounts(split, pairs.counts, len(pairs), len(pairs))
    some = np.unique(np.linspace(0, len(pairs) - 1, SAMPLE).round().astype(int))
    total, counted, end = np.zeros(65536, np.int64), 0, time.monotonic() + SECONDS
    # A random order: if the time runs out, the counted maps are still spread over the split.
    for index in np.random.default_rng(0).permutation(some):
        total += pairs.label_counts(int(index))
        counted += 1
        if time.monotonic() > end:
            break
    return SplitCounts(split, total, counted, len(pairs))


def findings(labels: Labels, name: str, splits: list[SplitCounts]) -> list[str]:
    """Warnings about probable mistakes, one line each.

    Raises:
        UserError: every label of the whole training split is ignored.
    """
    values = _values(labels)
    messages = []
    for one in splits:
        hint = looks_like(labels, name, one)
        absent = [labels.classes[k] for k, value in enumerate(values) if not one.counts[value]]
        if len(absent) == len(values):
            message = f"{one.where}: no pixel has a class, every label is ignored ({_seen(one.counts)}){hint}"
            if one.split == "train" and one.counted == one.maps:
                raise UserError(message + ("" if hint else "; name the values of the classes with data.values"))
            messages.append(message)
        elif absent:
            what = "cannot be learnt" if one.split == "train" else "get no score"
            listed = ", ".join(absent[:8]) + f" and {len(absent) - 8} more" * (len(absent) > 8)
            messages.append(
                f"{one.where}: classes without a pixel, which {what}: {listed} ({len(absent)} of {len(values)}){hint}"
            )
        elif hint:
            messages.append(f"{one.where}{hint.replace('; this', ': this', 1)}")
        unknown = _unknown(labels, one.counts)
        if len(unknown):
            messages.append(
                f"{one.where}: label values {', '.join(map(str, unknown[:8]))} are neither a class nor ignored; training "
                "stops at the first such file; name them in data.values or data.ignore"
            )
    return messages


def looks_like(labels: Labels, name: str, one: SplitCounts) -> str:
    """A hint that the labels follow another convention, with the setting for it; an empty text if nothing is suspicious."""
    seen = set(np.flatnonzero(one.counts).tolist())
    classes = set(_values(labels))
    if label_kind(len(classes)) is not BYTES:
        # The conventions below are those of label maps of 8 bits.
        return ""
    ignored = BYTES.ignore
    others = seen - {ignored}
    if name == "cityscapes" and labels.values and max(classes) > 18 and others and max(others) <= 18:
        return (
            "; this looks like trainIds (0..18) instead of labelIds, which would mix up the classes; give the "
            f"*_labelIds.png files, or add --set {_consecutive(19)}"
        )
    if name == "ade20k" and 0 not in classes and ignored in seen and max(others, default=0) <= 149:
        return (
            "; this looks like labels that are already reduced (0..149, and 255 for none): the first class would be ignored "
            f"and every other class shifted by one; give the original files, or add --set {_consecutive(150)}"
        )
    if name == "cocostuff" and others & set(COCO_STUFF_UNUSED) and max(others) <= 170 and 11 not in classes:
        return (
            "; this looks like labels that are already reduced (0..170): the original files never contain "
            f"{min(others & set(COCO_STUFF_UNUSED))}; give the original files, or add --set {_consecutive(171)}"
        )
    if ignored in seen and ignored not in classes and any(not one.counts[value] for value in classes):
        share = f"{one.share([ignored]):.1f} % of the pixels are 255"
        if len(classes) == 2 and len(others) <= 1:
            first = min(others, default=0)
            return (
                f"; this looks like masks of {first} and 255: {share}, which is ignored; list it as a class's value with "
                f"data.values, as in --set 'data.values=[{first}, 255]'"
            )
        return f"; {share}, which is ignored; if it is a class, list it as that class's value with data.values"
    return ""


def _consecutive(count: int) -> str:
    return f"'data.values=[{', '.join(map(str, range(count)))}]'"


def _values(labels: Labels) -> list[int]:
    return list(labels.values or range(len(labels.classes)))


def _ignored(labels: Labels) -> list[int]:
    return sorted({label_kind(len(labels.classes)).ignore, *labels.ignore} - set(_values(labels)))


def _unknown(labels: Labels, counts: np.ndarray) -> np.ndarray:
    known = np.zeros(65536, bool)
    known[[*_values(labels), *_ignored(labels)]] = True
    return np.flatnonzero((counts > 0) & ~known)


def _seen(counts: np.ndarray) -> str:
    seen = np.flatnonzero(counts)
    return f"values {', '.join(map(str, seen[:8]))}" + ", ..." * (len(seen) > 8)


def _table(labels: Labels, splits: list[SplitCounts]) -> Table:
    table = Table(title="share of the labels' pixels, %", title_justify="left")
    table.add_column("class")
    table.add_column("value", justify="right")
    for one in splits:
        part = f"{one.maps}" if one.counted == one.maps else f"{one.counted} of {one.maps}"
        table.add_column(f"{one.split}, {part} maps", justify="right")

    def row(name: str, value: str, values: list[int] | np.ndarray) -> None:
        shares = [_percent(one.share(values)) if one.counts[values].sum() else "none" for one in splits]
        table.add_row(Text(name), value, *shares)

    values = _values(labels)
    for k in _shown(splits[0].counts[values]):
        if k is None:
            table.add_row("...", "", *("" for _ in splits))
        else:
            row(labels.classes[k], str(values[k]), [values[k]])
    table.add_section()
    ignored = [value for value in _ignored(labels) if any(one.counts[value] for one in splits)]
    row("ignored", ", ".join(map(str, ignored[:4])) + ", ..." * (len(ignored) > 4), ignored)
    unknown = sorted({int(value) for one in splits for value in _unknown(labels, one.counts)})
    if unknown:
        row("unknown", ", ".join(map(str, unknown[:4])) + ", ..." * (len(unknown) > 4), unknown)
    return table


def _shown(counts: np.ndarray) -> list[int | None]:
    """Indices of the classes to show; ``None`` marks a gap."""
    if len(counts) <= _MOST_ROWS:
        return list(range(len(counts)))
    order = np.argsort(-counts, kind="stable").tolist()
    return [*order[: _MOST_ROWS // 2], None, *order[-(_MOST_ROWS // 2) :]]


def _percent(share: float) -> str:
    return f"{share:.2f}" if share >= 0.005 else "< 0.01"
