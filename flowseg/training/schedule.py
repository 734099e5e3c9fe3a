"""The learning rate of each step."""

from __future__ import annotations

import math

from flowseg.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, progress: float) -> float:
    """The rate of step ``step`` (counted from 0).

    It rises linearly during warm-up, then falls to ``lr * lr_end`` as ``progress`` goes from 0 to 1: along a cosine, along
    a straight line, or not at all, as ``optim.schedule`` says.
    """
    rate = optim.lr
    progress = min(progress, 1.0)
    if optim.schedule != "constant":
        left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        rate *= optim.lr_end + (1 - optim.lr_end) * left
    return rate * min(1.0, (step + 1) / optim.warmup) if optim.warmup else rate
