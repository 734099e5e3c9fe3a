"""Validation: one confusion matrix over a split at native label resolution, and the scores made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowseg.codes import IGNORE_INDEX
from flowseg.data.datasets import Pairs
from flowseg.segment import Segmenter
from flowseg_kernels import decode_confusion


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
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    labelled = torch.zeros(classes, dtype=torch.int64)
    count = 0
    for images, targets in _batches(pairs, limit, segmenter.config.sample.batch_size, rank, world):
        field = segmenter.native_field(images)
        target = torch.from_numpy(np.stack([np.array(t, np.uint8) for t in targets])).to(field.device)
        confusion += decode_confusion(field, target, segmenter.codebook, ignore_index=IGNORE_INDEX).cpu()
        labelled += torch.bincount(target.flatten().long().cpu(), minlength=IGNORE_INDEX + 1)[:classes]
        count += len(images)
        if on_batch:
            on_batch(len(images))
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


def _batches(
    pairs: Pairs, limit: int | None, batch_size: int, rank: int, world: int
) -> Iterator[tuple[list[Image.Image], list[Image.Image]]]:
    """Neighbouring pairs of equal size, of this process's share."""
    images: list[Image.Image] = []
    targets: list[Image.Image] = []
    for index in chosen_indices(len(pairs), limit)[rank::world]:
        image, target = pairs[index]
        if images and (len(images) == batch_size or image.size != images[0].size):
            yield images, targets
            images, targets = [], []
        images.append(image)
        targets.append(target)
    if images:
        yield images, targets
