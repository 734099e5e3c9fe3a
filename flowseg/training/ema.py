"""The moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn

from flowseg.runs.parallel import local_part


class Ema:
    """An exponential moving average of the parameters, in float32.

    After ``n`` updates the decay is ``min(limit, (1 + n) / (10 + n))``. If parameters are sharded, each process averages
    its own shard.
    """

    def __init__(self, model: nn.Module, limit: float):
        self.limit = limit
        self.tensors = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move the average towards ``model``; ``updates`` is the number of earlier updates."""
        decay = min(self.limit, (1 + updates) / (10 + updates))
        current = [local_part(value.detach()).float() for value in model.parameters()]
        torch._foreach_lerp_([local_part(value) for value in self.tensors.values()], current, 1 - decay)
