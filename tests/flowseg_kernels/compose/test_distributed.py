"""DDP and FSDP in two processes give the losses and parameters of one process on the whole batch.

FSDP shards the whole module, each linear layer and norm, or each block of the decoder.
"""

import contextlib
import functools
import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor

import flowseg_kernels as fk

from .ranks import needs_gloo, run_two
from .steps import EveryOp, batch


def inputs(codes):
    torch.manual_seed(3)
    return batch(codes, 4, 8, 12)


def build(codes, patch_chunk=None):
    torch.manual_seed(4)
    return EveryOp(codes, patch_chunk=patch_chunk)


def sharded(step, kind):
    """Apply FSDP2 to parts of the decoder, then to the whole step."""
    mesh = init_device_mesh("cpu", (2,))
    layers = (torch.nn.Linear, torch.nn.RMSNorm)
    parts = {
        "fsdp": [],
        "fsdp of layers": [m for m in step.field.modules() if isinstance(m, layers)],
        "fsdp of blocks": [*step.field.blocks, step.field.final_layer],
    }
    for part in parts[kind]:
        fully_shard(part, mesh=mesh)
    return fully_shard(step, mesh=mesh)


def trained(step, loss_of, steps=2):
    """Train for a few steps of plain gradient descent and return the losses."""
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def run_rank(rank, meeting):
    """Train on this rank's half of the batch and compare with training on the whole batch."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    codes = fk.Codebook(fk.kronecker_centroids(19))
    whole = inputs(codes)
    half = [v.chunk(2)[rank] for v in whole]
    alone = build(codes)
    want = trained(alone, lambda: alone(*whole)[0])
    kinds = ("ddp", "fsdp", "fsdp of layers", "fsdp of blocks", "fsdp1 of layers")
    for kind, chunk in itertools.product(kinds, (None, 2)):
        step = build(codes, chunk)
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(step)
        elif kind == "fsdp1 of layers":
            policy = functools.partial(size_based_auto_wrap_policy, min_num_params=50)
            wrapped = FullyShardedDataParallel(
                step, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
            )
        else:
            wrapped = sharded(step, kind)
            local, total = (sum(f(p) for p in step.parameters()) for f in (lambda p: p.to_local().numel(), torch.numel))
            assert local < 0.6 * total
        # DDP and FSDP average gradients over processes, but the loss is a sum over pixels.
        losses = trained(wrapped, lambda wrapped=wrapped: wrapped(*half)[0] * 2)
        for got, expected in zip(losses, want):
            dist.all_reduce(got)
            torch.testing.assert_close(got / 2, expected, rtol=1e-4, atol=1e-4)
        fsdp1 = kind.startswith("fsdp1")
        with FullyShardedDataParallel.summon_full_params(wrapped) if fsdp1 else contextlib.nullcontext():
            for (name, got), expected in zip(step.named_parameters(), alone.parameters(), strict=True):
                got = got.full_tensor() if isinstance(got, DTensor) else got
                torch.testing.assert_close(
                    got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, k=(kind, chunk): f"{k} {n}: {m}"
                )
    dist.destroy_process_group()


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    run_two(__name__, tmp_path)
