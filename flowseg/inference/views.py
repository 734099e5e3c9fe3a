"""Labels of several views of an image (scales, mirror images, overlapping windows), and resizing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowseg.devices import to_device
from flowseg.label_kinds import label_kind
from flowseg_kernels import Codebook, class_probabilities, nearest_centroid


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows that cover ``length``, ``stride`` apart; the last window is moved back to end with the axis."""
    if length <= window:
        return [0]
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def windows(height: int, width: int, window: tuple[int, int], stride: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Row and column slices of the windows of an image, row by row."""
    rows, columns = (
        [slice(start, start + size) for start in window_starts(length, size, step)]
        for length, size, step in zip((height, width), window, stride)
    )
    return [(row, column) for row in rows for column in columns]


@dataclasses.dataclass(frozen=True)
class Taps:
    """The positions that a result reads along one axis: ``result[i] = sum_t weight[i, t] source[index[i, t]]``."""

    index: Tensor
    weight: Tensor

    def on(self, device: torch.device) -> Taps:
        return Taps(to_device(self.index, device), to_device(self.weight, device))

    def __getitem__(self, some: slice) -> Taps:
        return Taps(self.index[some], self.weight[some])


def resizing(old: int, new: int, *, antialias: bool = False) -> Taps:
    """The taps of bilinear interpolation from ``old`` to ``new`` positions, as ``F.interpolate`` has them."""
    place = (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new)
    if not antialias or old <= new:
        place = (place - 0.5).clamp(0, old - 1)
        first = place.floor().long()
        share = place - first
        return Taps(torch.stack([first, (first + 1).clamp_max(old - 1)], 1), torch.stack([1 - share, share], 1).float())
    # A triangle as wide as two positions of the result, cut off at the borders.
    reach = old / new
    first = (place - reach + 0.5).long().clamp_min(0)
    index = first[:, None] + torch.arange(math.ceil(2 * reach) + 1)
    weight = (1 - ((index + 0.5 - place[:, None]) / reach).abs()).clamp_min(0) * (index < old)
    return Taps(index.clamp_max(old - 1), (weight / weight.sum(1, keepdim=True)).float())


def after(first: Taps, then: Taps) -> Taps:
    """The taps of two resizings, one after the other."""
    index = first.index[then.index].flatten(1)
    weight = (then.weight[..., None] * first.weight[then.index]).flatten(1)
    lowest = index.amin(1, keepdim=True)
    total = weight.new_zeros(len(index), int((index - lowest).max()) + 1).scatter_add_(1, index - lowest, weight)
    return Taps((lowest + torch.arange(total.shape[1])).clamp_max(int(index.max())), total)


def part_of(taps: Taps, source: slice, share: Tensor) -> tuple[slice, Taps]:
    """The positions that read a part of the source, and their taps relative to that part.

    A tap without weight reads the position of another tap of its row, so that its value changes nothing.

    Args:
        taps: of the whole axis.
        source: the part.
        share: weight of each position of the source in this part, ``(old,)``.
    """
    inside = (taps.index >= source.start) & (taps.index < source.stop)
    weight = torch.where(inside, taps.weight * share[taps.index.clamp_max(len(share) - 1)], 0)
    reading = (weight > 0).any(1).nonzero()[:, 0]
    rows = slice(int(reading[0]), int(reading[-1]) + 1)
    weight = weight[rows]
    used = (weight > 0).any(0)
    index, weight = taps.index[rows][:, used] - source.start, weight[:, used]
    index = torch.where(weight > 0, index, index.gather(1, weight.argmax(1, keepdim=True)))
    return rows, Taps(index, weight)


class Part(NamedTuple):
    """A view of a part of an image: the field of a window, or of the whole image.

    Attributes:
        field: ``(C, h, w)``.
        rows, columns: the part of the result that reads it.
        across_rows, across_columns: how each row and column of that part reads it, on the device of the field.
    """

    field: Tensor
    rows: slice
    columns: slice
    across_rows: Taps
    across_columns: Taps

    @classmethod
    def of(cls, field: Tensor, rows: tuple[slice, Taps], columns: tuple[slice, Taps]) -> Part:
        return cls(field, rows[0], columns[0], rows[1].on(field.device), columns[1].on(field.device))

    def taps(self, rows: slice, columns: slice) -> tuple[Taps, Taps]:
        """The taps of a part of the result."""
        top, left = self.rows.start, self.columns.start
        return (
            self.across_rows[rows.start - top : rows.stop - top],
            self.across_columns[columns.start - left : columns.stop - left],
        )


class Views:
    """The most probable classes of the mean of several views, without maps of all classes.

    The mean is that of the class probabilities ``p_k``, proportional to ``1 / (d_k + eps)``, of every view and every tap. A pixel
    whose views and taps all have the same nearest code has that class, as its probability is the largest in each of them. So
    probabilities are needed only where they differ. There the mean is computed for all classes, a bounded number of pixels at a
    time: the classes are exactly those of the mean of all maps, up to rounding where two classes are equally probable. Finding
    those pixels would make a GPU wait, so other devices than the CPU compute the mean of all pixels.

    Args:
        codebook: codes of the classes.
        eps: added to squared distances; ``None``: the codebook's default.
        numbers: largest number of class probabilities in memory; ``None``: 2**22 on a CPU, where they stay in the cache, else
            2**25.
    """

    def __init__(self, codebook: Codebook, eps: float | None, numbers: int | None = None):
        self.codebook, self.eps, self.numbers = codebook, eps, numbers

    def labels(self, views: Sequence[Iterator[Part]], size: tuple[int, int]) -> Tensor:
        """Labels ``(H, W)`` of the mean of views; the ignored label where the mean is NaN.

        Only the parts that overlap the current rows are kept.

        Args:
            views: the parts of each view, by their first row. The parts of one view add up to weight 1 at every pixel.
            size: ``(H, W)``.
        """
        kind = label_kind(self.codebook.num_classes)
        labels = torch.empty(size, dtype=kind.dtype, device=self.codebook.centroids.device)
        waiting = [next(view, None) for view in views]
        active: list[tuple[Part, Tensor | None]] = []
        done = 0
        while done < size[0]:
            for at, view in enumerate(views):
                while (part := waiting[at]) is not None and part.rows.start <= done:
                    active.append((part, self._decoded(part.field)))
                    waiting[at] = next(view, None)
            stop = min((part.rows.start for part in waiting if part is not None), default=size[0])
            for rows, columns in cells([part for part, _ in active], slice(done, stop), size[1]):
                some = [(p, found) for p, found in active if covers(p.rows, rows) and covers(p.columns, columns)]
                labels[rows, columns] = self._labels_of_cell(some, rows, columns)
            active = [(part, found) for part, found in active if part.rows.stop > stop]
            done = stop
        return labels

    def _decoded(self, field: Tensor) -> Tensor | None:
        """The nearest codes of a field; ``None`` where the pixels that need no probabilities are not looked for."""
        if field.device.type != "cpu":
            return None
        kind = label_kind(self.codebook.num_classes)
        return nearest_centroid(field[None], self.codebook, out_dtype=kind.dtype, ignore_index=kind.ignore)[0]

    def _labels_of_cell(self, parts: list[tuple[Part, Tensor | None]], rows: slice, columns: slice) -> Tensor:
        """Labels of a rectangle all of whose pixels have the same parts."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        device = parts[0][0].field.device
        taps = [(part.field, *part.taps(rows, columns)) for part, _ in parts]
        if parts[0][1] is None:
            kind = label_kind(self.codebook.num_classes)
            labels = torch.empty(shape[0] * shape[1], dtype=kind.dtype, device=device)
            places: Tensor | None = None
            count = len(labels)
        else:
            ranges = [smallest_and_largest(found, *across) for (_, found), (_, *across) in zip(parts, taps)]
            low, high = ranges[0]
            for smallest, largest in ranges[1:]:
                low, high = torch.minimum(low, smallest), torch.maximum(high, largest)
            labels, places = low.flatten(), (low != high).flatten().nonzero()[:, 0]
            count = len(places)
        numbers = self.numbers or (2**22 if device.type == "cpu" else 2**25)
        step = max(1, numbers // self.codebook.num_classes)
        for first in range(0, count, step):
            last = min(first + step, count)
            some = torch.arange(first, last, device=device) if places is None else places[first:last]
            found = likeliest(self.mean(taps, some // shape[1], some % shape[1]))
            if places is None:
                labels[first:last] = found
            else:
                labels[some] = found
        return labels.view(shape)

    def mean(self, taps: list[tuple[Tensor, Taps, Taps]], rows: Tensor, columns: Tensor) -> Tensor:
        """Sum of class probabilities ``(K, N)`` over views and taps, at N pixels."""
        total: Tensor | None = None
        for field, across_rows, across_columns in taps:
            ys, row_weights = across_rows.index[rows], across_rows.weight[rows]
            xs, column_weights = across_columns.index[columns], across_columns.weight[columns]
            for (y, row_weight), (x, column_weight) in itertools.product(
                zip(ys.unbind(1), row_weights.unbind(1)), zip(xs.unbind(1), column_weights.unbind(1))
            ):
                p = class_probabilities(field[:, y, x][None, :, None], self.codebook, eps=self.eps)[0, :, 0]
                weight = row_weight * column_weight
                total = p.mul_(weight) if total is None else total.addcmul_(p, weight)
        return total


def smallest_and_largest(labels: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Tensor]:
    """The smallest and the largest label that each pixel of a result reads."""
    low = high = labels
    for dim, taps in enumerate((rows, columns)):
        lows, highs = ([v.index_select(dim, at) for at in taps.index.unbind(1)] for v in (low, high))
        low, high = functools.reduce(torch.minimum, lows), functools.reduce(torch.maximum, highs)
    return low, high


def covers(outer: slice, inner: slice) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def cells(parts: list[Part], rows: slice, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut rows of a result into rectangles at the borders of parts: all pixels of a rectangle have the same parts."""
    edges = [
        sorted({first, last, *(e for s in sides for e in (s.start, s.stop) if first < e < last)})
        for first, last, sides in (
            (rows.start, rows.stop, [part.rows for part in parts]),
            (0, width, [part.columns for part in parts]),
        )
    ]
    for top, bottom in itertools.pairwise(edges[0]):
        for left, right in itertools.pairwise(edges[1]):
            yield slice(top, bottom), slice(left, right)


def interpolated_columns(field: Tensor, size: tuple[int, int], numbers: int = 2**24) -> Iterator[tuple[slice, Tensor]]:
    """Interpolate ``(C, h, w)`` bilinearly to ``(H, W)``, some columns at a time.

    Columns are interpolated before rows, and each part spans all rows, so the parts equal the whole bit for bit.

    Args:
        field: ``(C, h, w)``.
        size: ``(H, W)``.
        numbers: largest number of values in a part.
    """
    height, width = size
    options = {"mode": "bilinear", "align_corners": False}
    if len(field) * height * width <= numbers:
        yield slice(0, width), F.interpolate(field[None], size=size, **options)[0]
        return
    across = F.interpolate(field[None], size=(field.shape[1], width), **options)
    step = max(1, numbers // (len(field) * height))
    for first in range(0, width, step):
        columns = slice(first, min(first + step, width))
        part = across[..., columns]
        yield columns, F.interpolate(part, size=(height, part.shape[-1]), **options)[0]


def enlarge_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels ``(h, w)`` to ``size`` ``(H, W)`` by nearest neighbour; the dtype stays."""
    if labels.dtype == torch.int32:
        # F.interpolate takes no int32: it gives the place of each row and column instead.
        places = (torch.arange(side, dtype=torch.float32)[None, None] for side in labels.shape)
        rows, columns = (
            F.interpolate(old, size=new, mode="nearest-exact")[0, 0].int() for old, new in zip(places, size)
        )
        return labels[to_device(rows, labels.device)][:, to_device(columns, labels.device)]
    return F.interpolate(labels[None, None], size=size, mode="nearest-exact")[0, 0]


def likeliest(probabilities: Tensor) -> Tensor:
    """The most probable class ``(h, w)`` of probabilities ``(K, h, w)``, in the dtype for K classes.

    Pixels whose probabilities are NaN have the ignored label.
    """
    kind = label_kind(len(probabilities))
    return probabilities.argmax(0).to(kind.dtype).masked_fill_(probabilities[0].isnan(), kind.ignore)
