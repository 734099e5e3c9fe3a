"""Times of training examples on the path of the flow."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_times(
    batch: int,
    *,
    sampler: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    zero_fraction: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one time in [0, 1] per image.

    With a deterministic source, ``x_t`` at t > 0 already contains the answer: a network that knows the image can solve
    for it. Sampling, however, starts at t = 0, which a continuous distribution never draws. ``zero_fraction`` is the share
    of the times that are exactly 0.

    Args:
        batch: number of times.
        sampler: ``"uniform"`` on [0, 1), or ``"logit_normal"``: ``sigmoid(mean + std * N(0, 1))``.
        mean, std: mean and standard deviation of the normal distribution under the sigmoid.
        shift: ``s`` in ``t / (t + (1 - t) s)``; values above 1 move times towards 0.
        zero_fraction: probability of exactly t = 0.
        generator: CPU generator.

    Returns:
        ``(batch,)`` float32 on the CPU.
    """
    if sampler == "uniform":
        t = torch.rand(batch, generator=generator)
    elif sampler == "logit_normal":
        t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
    else:
        raise ValueError(f"sampler must be 'uniform' or 'logit_normal', got {sampler!r}")
    t = t / (t + (1 - t) * shift)
    at_source = torch.rand(batch, generator=generator) < zero_fraction
    return torch.where(at_source, torch.zeros_like(t), t)
