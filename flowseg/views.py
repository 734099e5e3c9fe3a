"""Several views of one image: other scales, mirrored, overlapping windows; and the mean of what they say."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows that cover ``length``, ``stride`` apart but for the last, which ends where the axis ends."""
    if length <= window:
        return [0]
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def windows(height: int, width: int, window: tuple[int, int], stride: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Places of the windows of an image, row by row."""
    rows, columns = (
        [slice(start, start + size) for start in window_starts(length, size, step)]
        for length, size, step in zip((height, width), window, stride)
    )
    return [(row, column) for row in rows for column in columns]


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """``(3, H, W)`` with its edge repeated at the right and bottom up to ``height`` and ``width``.

    Repeated edges look less like an object than a black bar does.
    """
    right, below = max(width - image.shape[-1], 0), max(height - image.shape[-2], 0)
    return F.pad(image[None], (0, right, 0, below), mode="replicate")[0] if right or below else image


def class_probabilities(field: Tensor, centroids: Tensor, eps: float) -> Tensor:
    """``p_k = 1 / (d_k + eps)`` over the sum of the same, ``d_k`` the squared distance to code k.

    Args:
        field: ``(B, C, H, W)``.
        centroids: ``(K, C)``.
        eps: added to the distances.

    Returns:
        ``(B, K, H, W)`` float32.
    """
    distance = field.new_zeros(field.shape[0], len(centroids), *field.shape[-2:])
    for channel, codes in zip(field.unbind(1), centroids.unbind(1)):
        distance += (channel[:, None] - codes[:, None, None]).square()
    weight = distance.add_(eps).reciprocal_()
    return weight.div_(weight.sum(1, keepdim=True))


def mean_over_windows(parts: Iterator[tuple[tuple[slice, slice], Tensor]], height: int, width: int) -> Tensor:
    """Mean ``(K, H, W)`` of the windows' ``(K, h, w)`` wherever they lie."""
    total: Tensor | None = None
    for (rows, columns), part in parts:
        if total is None:
            total = part.new_zeros(part.shape[0], height, width)
            count = part.new_zeros(height, width)
        total[:, rows, columns] += part
        count[rows, columns] += 1
    return total.div_(count)


def resize_labels(probabilities: Tensor, size: tuple[int, int], strip: int = 2**24) -> Tensor:
    """Likeliest class ``(H, W)`` at ``size`` of ``(K, h, w)``, interpolated bilinearly a strip of rows at a time.

    Args:
        probabilities: ``(K, h, w)``.
        size: ``(H, W)``.
        strip: most numbers of one strip: K maps at native size would be the largest arrays of the whole program.
    """
    classes, rows, columns = probabilities.shape
    height, width = size
    across = probabilities
    if columns != width:
        across = F.interpolate(across[None], size=(rows, width), mode="bilinear", align_corners=False)[0]
    if rows == height:
        return across.argmax(0)
    place = ((torch.arange(height, device=across.device) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    upper = place.floor().long()
    lower, share = (upper + 1).clamp_max(rows - 1), (place - upper).to(across.dtype)
    result = []
    for some in torch.arange(height, device=across.device).split(max(1, strip // (classes * width))):
        part = torch.lerp(across[:, upper[some]], across[:, lower[some]], share[some][:, None])
        result.append(part.argmax(0))
    return torch.cat(result)
