"""The random numbers of one training example: its time on the path, and the noise of a noise source."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowseg.config import Config
from flowseg.flow import sample_times


def draw_time_and_noise(config: Config, draw: int) -> tuple[Tensor, Tensor | None]:
    """Draw the time of a training example and, with ``flow.source=noise``, the noise that its path starts from.

    Both depend only on ``train.seed`` and the example's number ``draw`` in the run, not on how the examples of a step are
    divided among batches, processes and workers.

    Returns:
        t ``(1,)`` and noise ``(C, H, W)`` or ``None``, both float32.
    """
    flow, generator = config.flow, example_generator(config.train.seed, draw)
    t = sample_times(
        1,
        sampler=flow.time_sampler,
        mean=flow.time_mean,
        std=flow.time_std,
        shift=flow.time_shift,
        zero_fraction=flow.zero_fraction,
        generator=generator,
    )
    if flow.source != "noise":
        return t, None
    return t, torch.randn(config.codes.channels, config.data.height, config.data.width, generator=generator)


def example_generator(seed: int, draw: int) -> torch.Generator:
    """Make the generator of one example, which depends only on the seed and the example's number in the run."""
    # SeedSequence mixes the numbers: neighbouring examples get unrelated streams.
    words = np.random.SeedSequence((seed, 2, draw)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)
