"""Validation: one confusion matrix over a split at native label resolution, and the scores made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowseg.data.datasets import Pairs
from flowseg.segment import Segmenter


@dataclasses.dataclass
class Scores:
    """Scores of one split, in percent.

    Attributes:
        miou: mean over the classes that occur in the truth or in the prediction.
        pixel_accuracy: share of labelled pixels that are right.
        iou: by class; ``None`` for a class that occurs in neither.
        images: number of images.
        confusion: ``(K, K)`` int64, ``[truth, prediction]``.
        undecided: labelled pixels whose prediction was not a number; they count as wrong.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]
    images: int
    confusion: Tensor
    undecided: int = 0

    def summary(self, classes: tuple[str, ...]) -> dict:
        """JSON-ready numbers."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "images": self.images,
            "undecided_pixels": self.undecided,
            "iou": dict(zip(classes, self.iou)),
            "confusion": self.confusion.tolist(),
        }


def scores_from_confusion(confusion: Tensor, images: int = 0, undecided: Tensor | None = None) -> Scores:
    """``IoU_k = n_kk / (row_k + column_k - n_kk)``; classes with an empty union are left out of the mean.

    ``undecided`` ``(K,)`` counts pixels of each true class that decode to no class (NaN): misses, part of the union.
    """
    counts = confusion.to(torch.float64).cpu()
    missed = torch.zeros(len(counts), dtype=torch.float64) if undecided is None else undecided.to(torch.float64).cpu()
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit + missed
    iou = [100 * float(h / u) if u > 0 else None for h, u in zip(hit, union)]
    present = [value for value in iou if value is not None]
    total = float(counts.sum() + missed.sum())
    return Scores(
        miou=sum(present) / len(present) if present else 0.0,
        pixel_accuracy=100 * float(hit.sum()) / total if total else 0.0,
        iou=iou,
        images=images,
        confusion=confusion.cpu(),
        undecided=int(missed.sum()),
    )


def evaluate(
    segmenter: Segmenter,
    pairs: Pairs,
    *,
    limit: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    rank: int = 0,
    world: int = 1,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Segment a split and compare with its labels; label 255 is left out.

    Args:
        segmenter: the network with its sampling settings.
        pairs: images and labels at native size.
        limit: only this many images, evenly spread over the split.
        on_batch: called with the number of images of each finished batch.
        rank, world: this process among how many; each takes every ``world``-th image.
        add_up: sums a tensor over the processes. Counts are summed, so the scores are those of one process: a mean of the
            processes' mIoU would not be the mIoU.
    """
    classes = segmenter.codebook.num_classes
    # Rows and columns from ``classes`` on count ignored pixels and predictions that are no class.
    counts = torch.zeros(256, 256, dtype=torch.int64)
    count = 0
    for images, targets, native in _batches(segmenter, pairs, limit, rank, world):
        for (predicted, _), target in zip(segmenter.native_labels(images, native), targets):
            counts += _count_pairs(target.to(predicted.device), predicted)
        count += len(images)
        if on_batch:
            on_batch(len(images))
    confusion, labelled = counts[:classes, :classes].contiguous(), counts[:classes].sum(1)
    if add_up:
        sums = torch.cat([confusion.flatten(), labelled, torch.tensor([count])])
        sums = add_up(sums.to(segmenter.device)).cpu()
        confusion, labelled = sums[: classes**2].view(classes, classes), sums[classes**2 : -1]
        count = int(sums[-1])
    # A pixel that is not a number is in no column of the matrix; a diverged network must not gain by it.
    return scores_from_confusion(confusion, count, labelled - confusion.sum(1))


def chosen_indices(size: int, limit: int | None) -> list[int]:
    """All indices, or ``limit`` of them evenly spread: neighbouring files are often neighbouring video frames."""
    if limit is None or limit >= size:
        return list(range(size))
    return [round(i * (size - 1) / max(limit - 1, 1)) for i in range(limit)]


# Pixels of the label maps of one batch: enough for sixteen of most photographs, and a bound for the largest.
BATCH_PIXELS = 2**28


def _batches(
    segmenter: Segmenter, pairs: Pairs, limit: int | None, rank: int, world: int
) -> Iterator[tuple[list[Image.Image], list[Tensor], tuple[int, int]]]:
    """Neighbouring pairs of equal size, of this process's share: what the network sees, labels ``(H, W)`` uint8, their size.

    Images are held at the size that the network sees: sixteen photographs would fill the memory.
    """
    images: list[Image.Image] = []
    targets: list[Tensor] = []
    native = (0, 0)
    most = 1 if segmenter.several_views else segmenter.config.sample.batch_size
    for index in chosen_indices(len(pairs), limit)[rank::world]:
        image, target = pairs[index]
        size = image.size[::-1]
        full = len(images) == most or (len(images) + 1) * size[0] * size[1] > BATCH_PIXELS
        if images and (full or size != native):
            yield images, targets, native
            images, targets = [], []
        native = size
        images.append(segmenter.seen(image))
        targets.append(torch.from_numpy(np.array(target, np.uint8)))
        # The next pair is decoded before these names are taken by it.
        del image, target
    if images:
        yield images, targets, native


def _count_pairs(truth: Tensor, predicted: Tensor) -> Tensor:
    """How often each pair of values occurs, ``(256, 256)`` int64 on the host, of two label maps ``(H, W)`` uint8."""
    counts = torch.zeros(256 * 256, dtype=torch.int64, device=truth.device)
    for some, found in zip(truth.flatten().split(2**22), predicted.flatten().split(2**22)):
        counts += torch.bincount(some.int() * 256 + found, minlength=256 * 256)
    return counts.view(256, 256).cpu()
