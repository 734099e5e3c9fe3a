"""Validation: count true and predicted classes over a split at native resolution, and compute scores from the counts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowseg.data.datasets import Pairs
from flowseg.devices import to_device
from flowseg.errors import UserError
from flowseg.inference.counts import MOST_PAIRED, ClassCounts, ConfusedPairs, PairCounts, confused_pairs
from flowseg.inference.read_ahead import LargeOneByOne, read_ahead, reading_threads
from flowseg.label_kinds import BYTES, label_kind

if TYPE_CHECKING:
    # segment imports inference.views; a second import in the other direction would make the packages circular.
    from flowseg.segment import Segmenter


# Number of confused pairs in the JSON summary of more than 255 classes.
_LISTED = 1000


@dataclasses.dataclass
class Scores:
    """Scores of one split, in percent.

    Attributes:
        miou: mean IoU over the classes that occur in the truth or in the prediction.
        pixel_accuracy: share of labelled pixels that are right.
        iou: IoU per class; ``None`` for a class that occurs in neither.
        images: number of images.
        confusion: ``(K, K)`` int64, indexed ``[truth, prediction]``; ``None`` with more than ``MOST_PAIRED`` classes.
        undecided: number of labelled pixels whose prediction is NaN; they count as wrong.
        counts: ``(3, K)`` int64: hits, truths and predictions of each class. Truths include undecided pixels.
        pairs: the most frequent confused pairs, where there is no ``confusion``.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]
    images: int
    confusion: Tensor | None
    undecided: int = 0
    counts: Tensor | None = None
    pairs: ConfusedPairs | None = None

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """Up to ``count`` triples of true class, predicted class and number of pixels, the most frequent first."""
        return self.pairs.most(count) if self.confusion is None else confused_pairs(self.confusion, count)

    def notable(self, count: int) -> dict[str, list[int]]:
        """Up to ``count`` classes each that are the most frequent, the best and the worst; frequent classes come first in ties."""
        truths = self.counts[1].tolist()
        frequent = sorted((k for k, value in enumerate(self.iou) if value is not None), key=lambda k: -truths[k])
        best, worst = (sorted(frequent, key=lambda k: sign * self.iou[k]) for sign in (-1, 1))
        return {"most frequent": frequent[:count], "best": best[:count], "worst": worst[:count]}

    @property
    def missing_pixels(self) -> int:
        """Largest number of pixels that a count of :meth:`most_confused` may lack; 0 if they are exact."""
        return self.pairs.missing if self.confusion is None else 0

    def summary(self, classes: tuple[str, ...]) -> dict:
        """All scores as values for JSON; IoU by class name.

        ``confusion`` is a matrix up to 255 classes. With more classes there are ``hits``, ``truths`` and ``predictions`` of each
        class instead, and ``confused``: the most frequent pairs ``[truth, prediction, pixels]``, in which the pixels may be too
        few by ``confused_missing_pixels``.
        """
        facts = {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "images": self.images,
            "undecided_pixels": self.undecided,
            "iou": dict(zip(classes, self.iou)),
        }
        if len(classes) <= BYTES.ignore:
            return facts | {"confusion": self.confusion.tolist()}
        return {
            **facts,
            **dict(zip(("hits", "truths", "predictions"), self.counts.tolist())),
            "confused": [
                (classes[true], classes[found], pixels) for true, found, pixels in self.most_confused(_LISTED)
            ],
            "confused_missing_pixels": self.missing_pixels,
        }


def scores_from_confusion(confusion: Tensor, images: int = 0, undecided: Tensor | None = None) -> Scores:
    """Scores with ``IoU_k = n_kk / (row_k + column_k - n_kk)``; classes with an empty union are left out of the mean.

    Args:
        confusion: ``(K, K)`` counts ``[truth, prediction]``.
        images: number of images.
        undecided: ``(K,)`` pixels of each true class that decode to no class (NaN); they are misses and part of the union.
    """
    confusion = confusion.cpu()
    truths = confusion.sum(1) if undecided is None else confusion.sum(1) + undecided.cpu()
    scores = scores_by_class(torch.stack([confusion.diagonal(), truths, confusion.sum(0)]), images)
    return dataclasses.replace(scores, confusion=confusion)


def scores_by_class(counts: Tensor, images: int = 0, pairs: ConfusedPairs | None = None) -> Scores:
    """Scores with ``IoU_k = hits_k / (truths_k + predictions_k - hits_k)``; classes with an empty union are left out of the mean.

    Args:
        counts: ``(3, K)``: hits, truths and predictions by class. Truths include pixels that decode to no class (NaN).
        images: number of images.
        pairs: the confused pairs.
    """
    hits, truths, predictions = counts.to(torch.float64).tolist()
    unions = [truth + prediction - hit for hit, truth, prediction in zip(hits, truths, predictions)]
    iou = [100 * (hit / union) if union > 0 else None for hit, union in zip(hits, unions)]
    present = [value for value in iou if value is not None]
    total = sum(truths)
    return Scores(
        miou=sum(present) / len(present) if present else 0.0,
        pixel_accuracy=100 * sum(hits) / total if total else 0.0,
        iou=iou,
        images=images,
        confusion=None,
        undecided=int(total - sum(predictions)),
        counts=counts,
        pairs=pairs,
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
    """Segment a split and compare the result with its labels, in which the value for K classes is ignored.

    Threads read the next images while the network computes. Counts stay on the device until the last image. Up to
    ``MOST_PAIRED`` classes all pairs of classes are counted. With more, memory for counts grows with K, not with K x K: scores
    are still exact, and the list of confused pairs is as exact as :class:`flowseg.inference.counts.ConfusedPairs` says.

    Args:
        segmenter: the network with its sampling settings.
        pairs: images and labels at native size; several threads call its ``__getitem__`` at the same time.
        limit: use only this many images, evenly spread over the split.
        on_batch: called with the number of images of each finished batch.
        rank, world: number of this process, and of all processes; a process segments every ``world``-th image.
        add_up: sums a tensor over all processes. It sums counts, so the scores equal those of a single process; a mean
            of the mIoU of each process would differ.

    Raises:
        UserError: the labels of a pair do not have the size of its image, or a file cannot be used.
    """
    classes = segmenter.codebook.num_classes
    counts = (PairCounts if classes <= MOST_PAIRED else ClassCounts)(classes, segmenter.device)
    count = 0
    indices = chosen_indices(len(pairs), limit)[rank::world]
    with contextlib.closing(_batches(segmenter, pairs, indices)) as batches:
        for batch in batches:
            for (predicted, _), target in zip(segmenter.native_labels(batch.images, batch.native), batch.targets):
                counts.add(to_device(target, segmenter.device), predicted)
            count += len(batch.images)
            if on_batch:
                on_batch(len(batch.images))
            # Free the batch now: the next one is loaded before the loop binds this name again.
            del batch
    if isinstance(counts, ClassCounts):
        by_class, pairs = counts.by_class(), counts.pairs
        if add_up:
            by_class, pairs, count = _add_up_by_class(by_class, pairs, count, rank, world, add_up)
        return scores_by_class(by_class, count, pairs)
    confusion, labelled = counts.confusion()
    if add_up:
        sums = torch.cat([confusion.flatten(), labelled, torch.tensor([count])])
        sums = add_up(sums.to(segmenter.device)).cpu()
        confusion, labelled = sums[: classes**2].view(classes, classes), sums[classes**2 : -1]
        count = int(sums[-1])
    # A NaN prediction is in no column of the matrix: count it as wrong, or a diverged network would score better.
    return scores_from_confusion(confusion, count, labelled - confusion.sum(1))


def _add_up_by_class(
    counts: Tensor, pairs: ConfusedPairs, images: int, rank: int, world: int, add_up: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ConfusedPairs, int]:
    """Counts, confused pairs and number of images of all processes. Each process adds its pairs in its own place of the sum."""
    tables = torch.zeros(world, pairs.capacity, 2, dtype=torch.int64)
    tables[rank] = pairs.table()
    sums = add_up(torch.cat([counts.flatten(), torch.tensor([images, pairs.missing]), tables.flatten()])).cpu()
    counts, (images, missing), tables = sums.split([counts.numel(), 2, tables.numel()])
    merged = ConfusedPairs(pairs.classes, pairs.capacity)
    for table in tables.view(world, -1, 2):
        merged.add_table(table, 0)
    merged.add_table(tables.new_zeros(0, 2), int(missing))
    return counts.view(3, -1), merged, int(images)


def chosen_indices(size: int, limit: int | None) -> list[int]:
    """All indices, or ``limit`` evenly spread ones: neighbouring files are often neighbouring frames of a video."""
    if limit is None or limit >= size:
        return list(range(size))
    return [round(i * (size - 1) / max(limit - 1, 1)) for i in range(limit)]


# Largest number of label pixels in a batch: enough for sixteen photographs, and it bounds the memory of larger images.
BATCH_PIXELS = 2**28


class _Batch(NamedTuple):
    """Images of equal size as :meth:`Segmenter.seen` returns them, their labels ``(H, W)``, and their native size."""

    images: list[Image.Image]
    targets: list[Tensor]
    native: tuple[int, int]


def _check_size(index: int, image: Image.Image, labels: Tensor) -> None:
    if tuple(labels.shape) != image.size[::-1]:
        raise UserError(
            f"pairs[{index}]: the labels need the size of the image, height {image.height} and width {image.width}; "
            f"their shape is {tuple(labels.shape)}. Give one label per pixel of the image"
        )


def _batches(segmenter: Segmenter, pairs: Pairs, indices: list[int]) -> Iterator[_Batch]:
    """Group pairs into batches of neighbours with equal size. Threads read, resize and convert them."""
    most = 1 if segmenter.several_views else segmenter.config.sample.batch_size
    large = LargeOneByOne(pairs)
    kind = label_kind(segmenter.codebook.num_classes)

    def load(index: int) -> tuple[Image.Image, Tensor]:
        with large.reading(index):
            image, target = pairs[index]
            labels = torch.from_numpy(np.array(target, kind.array))
            _check_size(index, image, labels)
            # Resize in the thread: sixteen whole photographs would fill the memory.
            return segmenter.seen(image), labels

    threads = reading_threads(segmenter.config.data)
    on_cpu = segmenter.device.type == "cpu"
    options = {"threads": threads, "most": most + threads, "overlap": not on_cpu, "sizes": large.pixels}
    loaded = read_ahead(indices, load, lambda pair: pair[1].numel(), **options)
    images: list[Image.Image] = []
    targets: list[Tensor] = []
    native = (0, 0)
    with contextlib.closing(loaded):
        for image, target in loaded:
            size = tuple(target.shape)
            full = len(images) == most or (len(images) + 1) * target.numel() > BATCH_PIXELS
            if images and (full or size != native):
                yield _Batch(images, targets, native)
                images, targets = [], []
            native = size
            images.append(image)
            targets.append(target)
            del image, target
        if images:
            yield _Batch(images, targets, native)
