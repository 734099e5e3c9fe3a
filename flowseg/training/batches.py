"""The batches of each training step, and the count of examples that have been drawn."""

from __future__ import annotations

import itertools
from collections.abc import Generator

from rich.console import Console

from flowseg.config import Config, DataConfig
from flowseg.data.datasets import Pairs
from flowseg.data.loader import Batch, example_batches
from flowseg.data.workers import worker_count
from flowseg.runs.parallel import Ranks
from flowseg.runs.terminal import say


class StepBatches:
    """The batches of one step after another. A new loader starts when a stage of the run changes the size or the batch.

    Args:
        pairs: the training split.
        ranks: the processes that share each step.
        console: where to print the automatic number of workers; ``None`` prints nothing.

    Attributes:
        workers: number of processes that load the current stage; ``None`` before the first step.
    """

    def __init__(self, pairs: Pairs, ranks: Ranks, console: Console | None = None):
        self.pairs, self.ranks, self.console = pairs, ranks, console
        self._batches: Generator[Batch, None, None] | None = None
        self._settings: tuple[DataConfig, int] | None = None
        self.workers: int | None = None

    def next_step(self, stage: Config, first_draw: int) -> list[Batch]:
        """Load this process's batches of the next step, one per accumulated batch.

        Args:
            stage: settings of the stage that the step belongs to.
            first_draw: number of examples that all processes together have drawn so far.
        """
        settings = stage.data, stage.train.batch_size
        if self._settings != settings:
            # The workers that end here free the shared memory that the automatic number depends on.
            if self._batches is not None:
                self._batches.close()
            self._batches = example_batches(
                self.pairs,
                stage,
                workers=self._count_workers(stage),
                first_draw=first_draw,
                rank=self.ranks.rank,
                world=self.ranks.world,
            )
            self._settings = settings
        return [next(self._batches) for _ in range(stage.train.accumulation)]

    def _count_workers(self, stage: Config) -> int:
        workers = worker_count(stage)
        if stage.data.workers is None and workers != self.workers:
            say(self.console, f"data.workers: {workers} per process (automatic)")
        self.workers = workers
        return workers


def examples_per_step(stage: Config, world: int) -> int:
    """The number of examples that ``world`` processes draw for a step with the settings of its stage."""
    return stage.train.batch_size * stage.train.accumulation * world


def examples_before(config: Config, step: int, world: int) -> int:
    """The number of examples that ``world`` processes with these settings draw before ``step``."""
    ends = [stage.at for stage in config.train.stages if stage.at <= step]
    return sum(
        (last - first) * examples_per_step(config.at_step(first), world)
        for first, last in itertools.pairwise([0, *ends, step])
    )
