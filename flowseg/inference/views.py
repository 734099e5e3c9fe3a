"""Class probabilities of several views of an image (scales, mirror images, overlapping windows), their mean, and resizing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flowseg.devices import to_device
from flowseg.label_kinds import label_kind


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


def class_probabilities(field: Tensor, centroids: Tensor, eps: float) -> Tensor:
    """Class probabilities ``p_k`` proportional to ``1 / (d_k + eps)``, with ``d_k`` the squared distance to code k.

    Args:
        field: ``(B, C, H, W)``.
        centroids: ``(K, C)``.
        eps: added to the squared distances.

    Returns:
        ``(B, K, H, W)`` float32.
    """
    distance = field.new_zeros(field.shape[0], len(centroids), *field.shape[-2:])
    for channel, codes in zip(field.unbind(1), centroids.unbind(1)):
        distance += (channel[:, None] - codes[:, None, None]).square()
    weight = distance.add_(eps).reciprocal_()
    return weight.div_(weight.sum(1, keepdim=True))


def mean_over_windows(parts: Iterator[tuple[tuple[slice, slice], Tensor]], height: int, width: int) -> Tensor:
    """Mean ``(K, H, W)`` over windows ``(K, h, w)`` that may overlap."""
    total: Tensor | None = None
    for (rows, columns), part in parts:
        if total is None:
            total = part.new_zeros(part.shape[0], height, width)
            count = part.new_zeros(height, width)
        total[:, rows, columns] += part
        count[rows, columns] += 1
    return total.div_(count)


class WindowRows:
    """Mean class probabilities of overlapping windows, one band of rows after the other.

    :func:`mean_over_windows` needs memory for K maps of the whole image. This class keeps only the fields of windows that
    overlap the current or a later band.

    Args:
        fields: slices and field ``(C, h, w)`` of each window, in the order of :func:`windows`.
        height: number of rows of the image.
        probabilities: converts fields ``(1, C, h, w)`` to probabilities ``(1, K, h, w)``.
    """

    def __init__(
        self,
        fields: Iterator[tuple[tuple[slice, slice], Tensor]],
        height: int,
        probabilities: Callable[[Tensor], Tensor],
    ):
        self._fields, self._height, self._probabilities = fields, height, probabilities
        self._next = next(fields, None)
        self._active: list[tuple[int, slice, Tensor]] = []
        self._done = 0

    def advance(self) -> slice | None:
        """Move to the next band: the rows that no later window overlaps. Return ``None`` after the last band."""
        # Drop finished rows. The clone matters: a view would keep the memory of the whole window.
        self._active = [
            (self._done, columns, field[:, self._done - top :].clone())
            for top, columns, field in self._active
            if top + field.shape[1] > self._done
        ]
        if self._next is None:
            return None
        first = self._next[0][0].start
        while self._next is not None and self._next[0][0].start == first:
            (rows, columns), field = self._next
            self._active.append((rows.start, columns, field))
            self._next = next(self._fields, None)
        begin, self._done = self._done, self._height if self._next is None else self._next[0][0].start
        return slice(begin, self._done)

    def mean(self, rows: slice, columns: slice) -> Tensor:
        """Mean probabilities ``(K, rows, columns)`` of a part of the current band."""
        total: Tensor | None = None
        for top, across, field in self._active:
            left, right = max(columns.start, across.start), min(columns.stop, across.stop)
            upper, lower = max(rows.start, top), min(rows.stop, top + field.shape[1])
            if left >= right or upper >= lower:
                continue
            part = field[:, upper - top : lower - top, left - across.start : right - across.start]
            part = self._probabilities(part[None])[0]
            if total is None:
                total = part.new_zeros(len(part), rows.stop - rows.start, columns.stop - columns.start)
                count = part.new_zeros(total.shape[1:])
            place = (
                slice(upper - rows.start, lower - rows.start),
                slice(left - columns.start, right - columns.start),
            )
            total[(slice(None), *place)] += part
            count[place] += 1
        return total.div_(count)


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


def resize_labels(
    probabilities: Tensor, size: tuple[int, int], strip: int = 2**24, dtype: torch.dtype = torch.int64
) -> Tensor:
    """The most probable class ``(H, W)`` after bilinear interpolation of probabilities, a strip of rows at a time.

    Args:
        probabilities: ``(K, h, w)``.
        size: ``(H, W)``.
        strip: largest number of values in a strip; K maps at native size would be the largest arrays of the program.
        dtype: dtype of the result.

    Returns:
        Classes; the ignored label where the probabilities are NaN.
    """
    classes, rows, columns = probabilities.shape
    height, width = size
    options = {"mode": "bilinear", "align_corners": False}
    # These rows are computed on the CPU: reading them from the device would wait for it at each strip.
    place = ((torch.arange(height) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    above = place.floor().long()
    below = (above + 1).clamp_max(rows - 1)
    share = to_device((place - above).to(probabilities.dtype), probabilities.device)
    upper, lower = to_device(above, share.device), to_device(below, share.device)
    result = []
    step = max(1, strip // (classes * width))
    for start in range(0, height, step):
        some = slice(start, min(start + step, height))
        first, last = int(above[some.start]), int(below[some.stop - 1]) + 1
        across = probabilities[:, first:last]
        if columns != width:
            across = F.interpolate(across[None], size=(last - first, width), **options)[0]
        part = torch.lerp(across[:, upper[some] - first], across[:, lower[some] - first], share[some][:, None])
        result.append(likeliest(part if rows != height else across[:, start - first : some.stop - first]).to(dtype))
    return torch.cat(result)
