"""Several processes: sharded parameters, whole tensors from them and back, and small sums that keep processes in step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flowseg.errors import PeerError


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


class Ranks:
    """Sums over the processes of a few numbers on the host.

    They have a group of their own on gloo: a sum on the accelerator would make the host wait for all work queued there.
    """

    def __init__(self, world: int, rank: int = 0):
        self.world, self.rank = world, rank
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

    def agree(self, error: Exception | None) -> None:
        """Raise in all processes if one of them has an error; every process must call this.

        Raises:
            Exception: ``error``, in the first process that has one.
            PeerError: in the others, so that one message is printed.
        """
        if self.world == 1:
            if error:
                raise error
            return
        failed = torch.zeros(self.world, dtype=torch.int64)
        failed[self.rank] = error is not None
        failed = self.add_up_counts(failed)
        if not failed.any():
            return
        first = int(failed.nonzero()[0])
        if first == self.rank:
            raise error
        raise PeerError(f"process {first} of {self.world} has failed; its message says why") from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that must not sum anything itself; its failure in one process fails all of them."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)

    @contextlib.contextmanager
    def adding_up(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function that sums a tensor once, for a block whose failure in one process fails all of them."""
        reached = False

        def add_up(counts: Tensor) -> Tensor:
            nonlocal reached
            reached = True
            self.agree(None)
            return self.add_up_counts(counts)

        try:
            yield add_up
        except Exception as error:
            if not reached:
                self.agree(error)
            raise
