"""Several processes: sharded parameters, whole tensors from them and back, and small sums that keep processes in step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module) -> None:
    """Spread the parameters over all processes (FSDP2), a transformer block at a time.

    Torch's own ``fully_shard`` and not accelerate's plugin, which leaves sharding out on CPUs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, wanted: Tensor) -> Tensor:
    """``value``, the whole of a tensor, spread as ``wanted`` is."""
    if isinstance(wanted, DTensor) and value.shape == wanted.shape:
        return distribute_tensor(value.to(wanted.device), wanted.device_mesh, wanted.placements)
    return value


class Peers:
    """Sums over the processes of a few numbers on the host.

    They have a group of their own on gloo: a sum on the accelerator would make the host wait for all work queued there.
    """

    def __init__(self, world: int):
        self.world = world
        self._group = dist.new_group(backend="gloo") if world > 1 else None

    def add_up(self, *values: float) -> list[float]:
        """Sum of each value over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def add_up_counts(self, counts: Tensor) -> Tensor:
        """Sum of a whole-number tensor over all processes, on the host."""
        sums = counts.cpu()
        if self.world > 1:
            dist.all_reduce(sums, group=self._group)
        return sums
