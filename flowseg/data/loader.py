"""Training batches as a function of the seed and the number of examples drawn before: a resumed run gets the same ones."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from flowseg.config import Config, DataConfig, TrainConfig
from flowseg.data.datasets import Pairs
from flowseg.data.draws import draw_time_and_noise
from flowseg.data.transforms import augment, normalised
from flowseg.data.workers import BATCHES_AHEAD, lost_worker, start_method, worker_count
from flowseg.devices import host_may_go_on
from flowseg.errors import UserError
from flowseg.label_kinds import kind_of


class Batch(NamedTuple):
    """Training examples, in host memory or on the device that trains.

    Attributes:
        images: ``(B, 3, H, W)`` uint8; the device makes them float (:func:`flowseg.data.transforms.normalised`).
        labels: ``(B, H, W)`` uint8, 255 is ignored; with more than 255 classes int32, 65535 is ignored.
        t: ``(B,)`` float32, the times on the path of the flow.
        noise: ``(B, C, H, W)`` float32, the source with ``flow.source=noise``; else ``None``.
        draws: ``(B,)`` int64, the numbers of the examples in the run; always in host memory.
        labelled: number of pixels with a class.
    """

    images: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor | None
    draws: Tensor
    labelled: int

    def to(self, device: torch.device) -> Batch:
        """Copy what the device computes with. The host does not wait for a copy from pinned memory, except on an Apple GPU."""
        options = {"non_blocking": host_may_go_on(device)}
        moved = (part if part is None else part.to(device, **options) for part in self[:4])
        return Batch(*moved, self.draws, self.labelled)


class _Examples(Dataset):
    """Examples by ``(draw, index)``: the number of the draw seeds the augmentation, the time and the noise."""

    def __init__(self, pairs: Pairs, config: Config):
        self.pairs, self.config = pairs, config

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        draw, index = key
        image, labels = self.pairs[index]
        rng = np.random.default_rng((self.config.train.seed, 1, draw))
        return *augment(image, labels, self.config.data, rng), *draw_time_and_noise(self.config, draw), draw


def _collate(examples: list[tuple[Tensor, Tensor, Tensor, Tensor | None, int]]) -> Batch:
    images, labels, t, noise, draws = zip(*examples)
    # In a worker default_collate writes to shared memory, which spares a copy.
    images, labels, t = default_collate(images), default_collate(labels), torch.cat(t)
    noise = default_collate(noise) if noise[0] is not None else None
    return Batch(images, labels, t, noise, torch.tensor(draws), int((labels != kind_of(labels).ignore).sum()))


class _Draws:
    """Batches of ``(draw, index)`` for this process, from an endless sequence of shuffled epochs."""

    def __init__(self, size: int, batch: int, seed: int, first_draw: int, rank: int, world: int):
        self.size, self.batch, self.seed, self.first_draw, self.rank, self.world = (
            size,
            batch,
            seed,
            first_draw,
            rank,
            world,
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = None, -1
        first = self.first_draw + self.rank * self.batch
        while True:
            keys = []
            for draw in range(first, first + self.batch):
                epoch, place = divmod(draw, self.size)
                if epoch != order_epoch:
                    order, order_epoch = np.random.default_rng((self.seed, 0, epoch)).permutation(self.size), epoch
                keys.append((draw, int(order[place])))
            yield keys
            first += self.world * self.batch


def _with_workers(loader: DataLoader) -> Iterator:
    """Iterate without torch's SIGCHLD handler, which would raise in the middle of a step; a dead worker fails the next batch."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    previous = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, previous)


def example_batches(
    pairs: Pairs, config: Config, *, workers: int, first_draw: int = 0, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    """Endless training batches for one process, in pinned memory if there is a GPU. Closing the generator ends its workers.

    Args:
        pairs: the training split.
        config: the settings of a stage: size, augmentation, source, times, batch size and seed.
        workers: number of worker processes; 0: this process loads the examples.
        first_draw: number of examples that all processes together have drawn before.
        rank, world: number of this process, and of all processes.

    Raises:
        UserError: a file cannot be used (the message names it), or a worker process was killed.
    """
    loader = DataLoader(
        _Examples(pairs, config),
        batch_sampler=_Draws(len(pairs), config.train.batch_size, config.train.seed, first_draw, rank, world),
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        multiprocessing_context=start_method() if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from _with_workers(loader)
    except UserError as error:
        # A worker's message arrives after its traceback.
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None
    except (RuntimeError, OSError, EOFError) as error:
        lost = lost_worker(error, workers, config.data) if workers else None
        if lost is None:
            raise
        raise lost from None


def training_batches(
    pairs: Pairs,
    config: DataConfig,
    batch_size: int,
    *,
    seed: int,
    first_draw: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless training batches for one process, as floats in host memory.

    Args:
        pairs: the training split.
        config: size, augmentation and number of worker processes.
        batch_size: examples per batch of this process.
        seed: seed of order and augmentation.
        first_draw: number of examples that all processes together have drawn before.
        rank, world: number of this process, and of all processes.

    Raises:
        UserError: a file cannot be used (the message names it), or a worker process was killed.

    Yields:
        images ``(B, 3, H, W)`` float32 in [-1, 1], labels ``(B, H, W)`` as in :class:`Batch`, and the numbers ``(B,)`` of the
        draws.
    """
    settings = Config(data=config, train=TrainConfig(batch_size=batch_size, seed=seed))
    options = {"first_draw": first_draw, "rank": rank, "world": world}
    for batch in example_batches(pairs, settings, workers=worker_count(settings), **options):
        yield normalised(batch.images), batch.labels, batch.draws
