"""Training batches as a function of the seed and the number of examples drawn before: a resumed run gets the same ones."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowseg.config import DataConfig
from flowseg.data.datasets import Pairs
from flowseg.data.transforms import augment
from flowseg.errors import UserError


class _Augmented(Dataset):
    """Augmented examples by ``(draw, index)``: the number of the draw seeds the augmentation."""

    def __init__(self, pairs: Pairs, config: DataConfig, seed: int):
        self.pairs, self.config, self.seed = pairs, config, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        draw, index = key
        image, labels = self.pairs[index]
        return *augment(image, labels, self.config, np.random.default_rng((self.seed, 1, draw))), draw


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
    """Endless training batches for one process.

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
        images ``(B, 3, H, W)`` float32 in [-1, 1], labels ``(B, H, W)`` uint8, and the numbers ``(B,)`` of the draws.
    """
    loader = DataLoader(
        _Augmented(pairs, config, seed),
        batch_sampler=_Draws(len(pairs), batch_size, seed, first_draw, rank, world),
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from _with_workers(loader)
    except UserError as error:
        # A worker's message arrives after its traceback.
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A dead worker raises RuntimeError, or breaks the connection while it sends a batch.
        if not config.workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
            raise
        raise UserError(
            f"data.workers: a worker process died ({''.join(str(error).splitlines()[:1])}); it may have run out of memory: "
            f"give fewer than {config.workers} workers or smaller images, then --resume"
        ) from None
