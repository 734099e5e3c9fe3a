"""The batches of each training step, and the count of examples that have been drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from flowseg.config import Config, DataConfig, TrainConfig
from flowseg.data import training_batches
from flowseg.data.datasets import Pairs
from flowseg.runs.parallel import Ranks

Batch = tuple[Tensor, Tensor, Tensor]
"""Images ``(B, 3, H, W)``, labels ``(B, H, W)`` and the numbers ``(B,)`` of the examples in the run."""


class StepBatches:
    """The batches of one step after another. A new loader starts when a stage of the run changes the size or the batch.

    Args:
        pairs: the training split.
        ranks: the processes that share each step.
    """

    def __init__(self, pairs: Pairs, ranks: Ranks):
        self.pairs, self.ranks = pairs, ranks
        self._batches: Iterator[Batch] = iter(())
        self._settings: tuple[DataConfig, int] | None = None

    def next_step(self, data: DataConfig, train: TrainConfig, first_draw: int) -> list[Batch]:
        """Load this process's batches of the next step, one per accumulated batch.

        Args:
            data, train: settings of the stage that the step belongs to.
            first_draw: number of examples that all processes together have drawn so far.
        """
        if self._settings != (data, train.batch_size):
            self._batches = training_batches(
                self.pairs,
                data,
                train.batch_size,
                seed=train.seed,
                first_draw=first_draw,
                rank=self.ranks.rank,
                world=self.ranks.world,
            )
            self._settings = data, train.batch_size
        return [next(self._batches) for _ in range(train.accumulation)]


def examples_before(config: Config, step: int, world: int) -> int:
    """The number of examples that ``world`` processes with these settings draw before ``step``."""
    ends = [stage.at for stage in config.train.stages if stage.at <= step]
    return sum(
        (last - first) * config.at_step(first).train.batch_size * config.train.accumulation * world
        for first, last in itertools.pairwise([0, *ends, step])
    )
