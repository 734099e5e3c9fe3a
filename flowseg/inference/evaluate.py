"""Validation: count a confusion matrix over a split at native resolution, and compute scores from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowseg.data.datasets import Pairs

if TYPE_CHECKING:
    # segment imports inference.views; a second import in the other direction would make the packages circular.
    from flowseg.segment import Segmenter


@dataclasses.dataclass
class Scores:
    """Scores of one split, in percent.

    Attributes:
        miou: mean IoU over the classes that occur in the truth or in the prediction.
        pixel_accuracy: share of labelled pixels that are right.
        iou: IoU per class; ``None`` for a class that occurs in neither.
        images: number of images.
        confusion: ``(K, K)`` int64, indexed ``[truth, prediction]``.
        undecided: number of labelled pixels whose prediction is NaN; they count as wrong.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]
    images: int
    confusion: Tensor
    undecided: int = 0

    def summary(self, classes: tuple[str, ...]) -> dict:
        """All scores as values for JSON; IoU by class name."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "images": self.images,
            "undecided_pixels": self.undecided,
            "iou": dict(zip(classes, self.iou)),
            "confusion": self.confusion.tolist(),
        }


def scores_from_confusion(confusion: Tensor, images: int = 0, undecided: Tensor | None = None) -> Scores:
    """Scores with ``IoU_k = n_kk / (row_k + column_k - n_kk)``; classes with an empty union are left out of the mean.

    Args:
        confusion: ``(K, K)`` counts ``[truth, prediction]``.
        images: number of images.
        undecided: ``(K,)`` pixels of each true class that decode to no class (NaN); they are misses and part of the union.
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
    """Segment a split and compare the result with its labels; label 255 is ignored.

    Args:
        segmenter: the network with its sampling settings.
        pairs: images and labels at native size.
        limit: use only this many images, evenly spread over the split.
        on_batch: called with the number of images of each finished batch.
        rank, world: number of this process, and of all processes; a process segments every ``world``-th image.
        add_up: sums a tensor over all processes. It sums counts, so the scores equal those of a single process; a mean
            of the mIoU of each process would differ.
    """
    classes = segmenter.codebook.num_classes
    # Rows and columns from index ``classes`` on count ignored pixels and predictions that are not a class.
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
    # A NaN prediction is in no column of the matrix: count it as wrong, or a diverged network would score better.
    return scores_from_confusion(confusion, count, labelled - confusion.sum(1))


def chosen_indices(size: int, limit: int | None) -> list[int]:
    """All indices, or ``limit`` evenly spread ones: neighbouring files are often neighbouring frames of a video."""
    if limit is None or limit >= size:
        return list(range(size))
    return [round(i * (size - 1) / max(limit - 1, 1)) for i in range(limit)]


# Largest number of label pixels in a batch: enough for sixteen photographs, and it bounds the memory of larger images.
BATCH_PIXELS = 2**28


def _batches(
    segmenter: Segmenter, pairs: Pairs, limit: int | None, rank: int, world: int
) -> Iterator[tuple[list[Image.Image], list[Tensor], tuple[int, int]]]:
    """Group the pairs of this process into batches of neighbours with equal size.

    Yields images at the size that the network sees (sixteen whole photographs would fill the memory), their labels
    ``(H, W)`` uint8, and their native size.
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
        # Free the pair now: the next one is decoded before the loop rebinds these names.
        del image, target
    if images:
        yield images, targets, native


def _count_pairs(truth: Tensor, predicted: Tensor) -> Tensor:
    """Count the pairs of values of two label maps ``(H, W)`` uint8: ``(256, 256)`` int64 on the CPU."""
    counts = torch.zeros(256 * 256, dtype=torch.int64, device=truth.device)
    for some, found in zip(truth.flatten().split(2**22), predicted.flatten().split(2**22)):
        counts += torch.bincount(some.int() * 256 + found, minlength=256 * 256)
    return counts.view(256, 256).cpu()
