"""Counts of true and predicted classes, kept on the device: all pairs of classes, or a bounded part of them for many classes."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_PAIRED = 2048
"""Largest number of classes whose pairs are all counted: K x K numbers take 34 MB then. With 65,535 classes they would take
34 GB."""

MOST_PAIRS = 2**16
"""Number of confused pairs to keep where not all are counted; they take 1 MB."""

# Number of pixels to count at a time: the cells of a chunk fit into the cache of a CPU.
_CHUNK = 2**18


class PairCounts:
    """Count pairs of labels without reading the device before the end.

    Neighbouring pixels mostly count in the same cell, and such additions wait for each other. So there are several copies of
    the matrix, and neighbours count in different copies.

    Args:
        classes: number of classes. Other values count together: as ignored in the truth, as undecided in predictions.
        device: device of the labels.
    """

    def __init__(self, classes: int, device: torch.device):
        self.side = classes + 1
        cells, on_cpu = self.side**2, self._on_cpu(device)
        copies = min(8, max(1, 2**15 // cells)) if on_cpu else min(16, max(1, 2**23 // cells))
        # bincount on a CPU is fastest for short integers, and for few cells; scatter_add_ needs long ones.
        self._bins = on_cpu and cells <= 2**16
        dtype = torch.int64 if not self._bins else torch.int16 if copies * cells <= 2**15 else torch.int32
        self._counts = torch.zeros(copies * cells, dtype=torch.int64, device=device)
        self._first = torch.arange(_CHUNK, device=device).remainder_(copies).mul_(cells).to(dtype)
        self._ones = torch.ones(0 if self._bins else _CHUNK, dtype=torch.int64, device=device)

    @staticmethod
    def _on_cpu(device: torch.device) -> bool:
        return device.type == "cpu"

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Count the pixels of two label maps ``(H, W)`` of one dtype."""
        others = self.side - 1
        for true, found in zip(truth.flatten().split(_CHUNK), predicted.flatten().split(_CHUNK)):
            cells = true.clamp(max=others).to(self._first.dtype).mul_(self.side).add_(found.clamp(max=others))
            cells += self._first[: len(cells)]
            if self._bins:
                self._counts += torch.bincount(cells, minlength=len(self._counts))
            else:
                # bincount would read the largest value back to choose the number of bins.
                self._counts.scatter_add_(0, cells, self._ones[: len(cells)])

    def confusion(self) -> tuple[Tensor, Tensor]:
        """The counts ``(K, K)`` [truth, prediction], and the number of pixels ``(K,)`` of each true class, on the CPU."""
        counts = self._counts.view(-1, self.side, self.side).sum(0)[:-1].cpu()
        return counts[:, :-1].contiguous(), counts.sum(1)


class ClassCounts:
    """Count hits, truths and predictions by class, and the most frequent confused pairs, for any number of classes.

    The device is not read before the end. Memory grows with K, not with K x K.

    Args:
        classes: number of classes K. Other values count together: as ignored in the truth, as undecided in predictions.
        device: device of the labels.

    Attributes:
        pairs: the confused pairs, :class:`ConfusedPairs`.
    """

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        self.pairs = ConfusedPairs(classes)
        self._counts = torch.zeros(3, classes + 1, dtype=torch.int64, device=device)
        self._ones = torch.ones(_CHUNK, dtype=torch.int64, device=device)

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Count the pixels of two label maps ``(H, W)`` of one dtype."""
        others = self.classes
        for true, found in zip(truth.flatten().split(_CHUNK), predicted.flatten().split(_CHUNK)):
            true, found = true.clamp(max=others).long(), found.clamp(max=others).long()
            found = found.where(true < others, others)
            # The last cell of each row takes the pixels that do not count.
            for row, cells in zip(self._counts, (true.where(true == found, others), true, found)):
                row.scatter_add_(0, cells, self._ones[: len(cells)])
            self.pairs.add(true, found)

    def by_class(self) -> Tensor:
        """Hits, truths and predictions ``(3, K)`` int64 on the CPU. Truths include undecided pixels; ignored ones are in none."""
        return self._counts[:, :-1].cpu()


class ConfusedPairs:
    """The most frequent pairs of a true class and another, predicted class, in bounded memory.

    Counts are exact as long as at most ``capacity`` different pairs occur. After that the rarest pairs are dropped, and a
    pair that returns starts from 0. ``missing`` bounds the error: no count is too large, and none, of a listed or of a
    dropped pair, is too small by more than that.

    The work has the same shapes whatever the labels are, so a GPU need not be read.

    Args:
        classes: number of classes K.
        capacity: number of pairs to keep.
    """

    def __init__(self, classes: int, capacity: int = MOST_PAIRS):
        self.classes, self.capacity = classes, capacity
        self._table: tuple[Tensor, Tensor] | None = None
        self._missing: Tensor | int = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._entries_waiting = 0

    @property
    def missing(self) -> int:
        """Largest number of pixels that the count of a pair may lack; 0 if all counts are exact."""
        self._merge()
        return int(self._missing)

    def add(self, true: Tensor, found: Tensor) -> None:
        """Count pixels: classes ``(N,)`` int64; K or more means ignored or undecided."""
        none = self.classes**2
        wrong = (true != found) & (true < self.classes) & (found < self.classes)
        codes = true * self.classes + found
        if codes.device.type == "cpu":
            # Neighbouring pixels are mostly of the same pair, and most pixels are right.
            codes, counts = torch.unique_consecutive(codes[wrong], return_counts=True)
        else:
            codes = codes.where(wrong, none)
            counts = wrong.long()
        self._queue(codes, counts)

    def table(self) -> Tensor:
        """``(capacity, 2)`` int64 on the CPU: each pair as ``truth * K + prediction``, and its count; rows of zeros are empty."""
        self._merge()
        result = torch.zeros(self.capacity, 2, dtype=torch.int64)
        if self._table is not None:
            codes, counts = (part.cpu() for part in self._table)
            result[: len(codes)] = torch.stack([codes, counts], 1) * (counts > 0)[:, None]
        return result

    def add_table(self, table: Tensor, missing: int) -> None:
        """Add a table and the ``missing`` of other counts."""
        self._queue(*table[table[:, 1] > 0].T)
        self._missing = self._missing + missing

    def most(self, count: int) -> list[tuple[int, int, int]]:
        """Up to ``count`` triples of truth, prediction and number of pixels, the most frequent first, then by class."""
        rows = self.table()[:count].tolist()
        return [(*divmod(code, self.classes), pixels) for code, pixels in rows if pixels]

    def _queue(self, codes: Tensor, counts: Tensor) -> None:
        if len(codes) == 0:
            return
        self._waiting.append((codes, counts))
        self._entries_waiting += len(codes)
        # A merge sorts the whole table: wait for as many new entries.
        if self._entries_waiting >= self.capacity:
            self._merge()

    def _merge(self) -> None:
        """Add up the waiting entries and the table, and keep the most frequent pairs."""
        if not self._waiting:
            return
        parts = [*self._waiting, *([] if self._table is None else [self._table])]
        self._waiting.clear()
        self._entries_waiting = 0
        codes, order = torch.cat([codes for codes, _ in parts]).sort()
        counts = torch.cat([counts for _, counts in parts])[order]
        # Equal codes are neighbours now. Sum each group into the place of its number.
        group = torch.zeros_like(codes)
        group[1:] = (codes[1:] != codes[:-1]).cumsum(0)
        sums = torch.zeros_like(counts).scatter_add_(0, group, counts)
        codes = torch.zeros_like(codes).scatter_(0, group, codes)
        # A stable sort puts pairs of equal counts in the order of their classes.
        sums, order = sums.sort(descending=True, stable=True)
        codes = codes[order]
        if len(sums) > self.capacity:
            self._missing = self._missing + sums[self.capacity]
        self._table = codes[: self.capacity].clone(), sums[: self.capacity].clone()


def confused_pairs(confusion: Tensor, count: int) -> list[tuple[int, int, int]]:
    """:meth:`ConfusedPairs.most` of a whole matrix ``(K, K)`` [truth, prediction]."""
    wrong = confusion.clone().fill_diagonal_(0)
    places = wrong.nonzero()
    pixels, order = wrong[places[:, 0], places[:, 1]].sort(descending=True, stable=True)
    return [(*place, number) for place, number in zip(places[order[:count]].tolist(), pixels[:count].tolist())]
