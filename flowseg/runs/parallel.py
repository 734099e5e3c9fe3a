"""Several processes of one run: sharded parameters, gathering and scattering tensors, and small sums on the host.

A *collective* is a call that every process must make, or the others wait for it without end.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowseg.errors import PeerError


def shard(model: nn.Module) -> None:
    """Shard the parameters over all processes (FSDP2), one transformer block at a time.

    This calls ``fully_shard`` of torch: Accelerate's plugin does not shard on CPUs.
    """
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # Importing torch.distributed.tensor takes a second. Where nothing has imported it, there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. A collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(value: Tensor, wanted: Tensor) -> Tensor:
    """Shard the whole tensor ``value`` in the way ``wanted`` is sharded."""
    if is_sharded(wanted) and value.shape == wanted.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(wanted.device), wanted.device_mesh, wanted.placements)
    return value


@torch.no_grad()
def copy_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, sharded or not, into the parameters of ``model`` with the same names. A collective."""
    parameters = dict(model.named_parameters())
    # Every process must visit every name: gathering a sharded tensor is a collective.
    for name, tensor in tensors.items():
        value = whole(tensor)
        if name in parameters:
            parameters[name].copy_(value)


class Ranks:
    """The processes of a run, which sum a few numbers on the host and fail together.

    They use a separate gloo group: a sum on the accelerator would make the host wait for all work queued there.

    Attributes:
        world: number of processes.
        rank: number of this process, from 0.
        group: the gloo group; ``None`` if there is one process.
    """

    def __init__(self, world: int, rank: int = 0):
        self.world, self.rank = world, rank
        self.group = dist.new_group(backend="gloo") if world > 1 else None

    def add_up(self, *values: float) -> list[float]:
        """Sum each value over all processes. A collective."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.group)
        return sums.tolist()

    def largest(self, *values: float) -> list[float]:
        """The largest of each value in all processes. A collective."""
        if self.world == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def add_up_counts(self, counts: Tensor) -> Tensor:
        """Sum an integer tensor over all processes; the result is on the host. A collective."""
        sums = counts.cpu()
        if self.world > 1:
            dist.all_reduce(sums, group=self.group)
        return sums

    def from_first(self, value: int) -> int:
        """The value that the first process gives. A collective."""
        return int(self.add_up(value if self.rank == 0 else 0)[0])

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks. A collective."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise in all processes if one of them has an error. A collective.

        Raises:
            Exception: ``error``, in the first process that has one.
            PeerError: in all other processes, so that one message is printed.
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
        """Run a block that contains no collective; if it fails in one process, it fails in all. A collective."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)

    @contextlib.contextmanager
    def adding_up(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run a block that sums one tensor with the function given; if it fails in one process, it fails in all.

        A collective. The block must call the function once.
        """
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
