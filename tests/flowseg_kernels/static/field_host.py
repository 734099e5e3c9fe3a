"""Host cost of a call of the field on a GPU: its launches, its calls of PyTorch, and its time without the launches.

`python -m tests.flowseg_kernels.static.field_host` prints a table in half a minute. Tensors are on the meta device, so a call of
PyTorch takes only the time of its host code. The column "host" leaves the launches out; "with Triton" adds what Triton does before
each launch. The last lines are the cost of the op, and of the decoder as a layer, around the kernels' host code, measured on small
tensors without any kernel; it does not depend on the number of patches. The layer's cost includes the generators and autograd.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import unittest.mock
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowseg_kernels as fk
from bench import field_plain
from bench.memory import without_kernels
from flowseg_kernels.ops.neural_field import triton_launch

from . import pretended_gpu

#: PixNerd's sizes.
PATCH, HIDDEN, RATIO = 16, 64, 2
DEPTHS = {"L": 2, "XL": 4}
OPTIONS = (PATCH, RATIO, 1e-6, "both", "residual")


def arguments(
    depth: int, patches: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> list[torch.Tensor]:
    made = [v.detach().to(device) for v in field_plain.inputs(patches=4, depth=depth, hidden=HIDDEN, dtype=dtype)]
    side = round(patches**0.5) * PATCH
    return [made[0].new_empty(1, 3, side, side), made[1].new_empty(1, patches, *made[1].shape[2:]), *made[2:]]


def forward(tensors: list[torch.Tensor]) -> torch.Tensor:
    return triton_launch.neural_field(*tensors, *OPTIONS)


def backward(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return triton_launch.neural_field_bwd(tensors[0], *tensors, *OPTIONS, [True] * len(tensors))


class Calls(NamedTuple):
    launches: list[str]
    torch: list[str]


class _Noted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls(run, tensors: list[torch.Tensor]) -> Calls:
    """Names of the kernels that a run launches and of the PyTorch ops it calls, in order."""
    launched = []
    with without_kernels(launched), torch.no_grad(), _Noted() as noted:
        run(tensors)
    return Calls(launched, noted.names)


def microseconds(run, *args, seconds: float = 1.0) -> float:
    """Median CPU time of the runs that fit in `seconds`. It leaves out what else runs on the machine."""
    run(*args)
    run(*args)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.thread_time()
        run(*args)
        times.append(time.thread_time() - start)
    return 1e6 * statistics.median(times)


@contextlib.contextmanager
def _op_without_kernels():
    """Inside the block fk.neural_field, on CPU tensors, calls two stubs instead of the host code of the Triton kernels."""
    both = {
        "neural_field": lambda x, *rest: torch.empty_like(x),
        "neural_field_bwd": lambda grad, *rest: tuple(map(torch.empty_like, rest[:8])),
    }
    with pretended_gpu.launches(), unittest.mock.patch.multiple(triton_launch, **both):
        yield


def wrapped() -> tuple[float, float]:
    """Microseconds of the op's forward, and of forward and backward together, without the host code of its kernels."""
    tensors = [v.requires_grad_() for v in arguments(1, 4, device="cpu")]

    def both():
        out = fk.neural_field(*tensors, patch_size=PATCH, mlp_ratio=RATIO)
        torch.autograd.grad(out, tensors, out)

    with _op_without_kernels():
        with torch.no_grad():
            once = microseconds(lambda: fk.neural_field(*tensors, patch_size=PATCH, mlp_ratio=RATIO))
        return once, microseconds(both)


class Layer:
    """The decoder as users call it, on a few patches of few hidden units."""

    def __init__(self, depth: int):
        self.module = fk.NeuralFieldDecoder(8, hidden=16, depth=depth, mlp_ratio=1).bfloat16()
        self.x, self.s = torch.zeros(1, 3, 32, 32).bfloat16(), torch.zeros(1, 4, 8).bfloat16().requires_grad_()
        self.grad = torch.zeros_like(self.x)

    def forward(self) -> torch.Tensor:
        return self.module(self.x, self.s)

    def both(self) -> None:
        for v in (self.s, *self.module.parameters()):
            v.grad = None
        self.forward().backward(self.grad)

    def calls(self) -> tuple[list[str], list[str]]:
        """Names of the PyTorch ops that forward and backward call, without those of the kernels' host code."""
        with _op_without_kernels():
            self.both()
            with _Noted() as forward:
                out = self.forward()
            with _Noted() as backward:
                out.backward(self.grad)
        return forward.names, backward.names

    def microseconds(self) -> float:
        """Time of forward and backward without the kernels' host code."""
        with _op_without_kernels():
            return microseconds(self.both)


def main() -> None:
    torch.set_num_threads(1)
    heads = "call", "launches", "calls of PyTorch", "host, us", "with Triton, us"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for model, depth in DEPTHS.items():
        for patches in (256, 1024, 4096):
            tensors = arguments(depth, patches)
            for run in (forward, backward):
                found = calls(run, tensors)
                with torch.no_grad():
                    with without_kernels():
                        bare = microseconds(run, tensors)
                    with pretended_gpu.launches():
                        whole = microseconds(run, tensors)
                name = f"{run.__name__} {model} {patches}"
                print(f"| {name} | {len(found.launches)} | {len(found.torch)} | {bare:.0f} | {whole:.0f} |", flush=True)
    print("the op around the host code: forward {:.0f} us, forward and backward {:.0f} us".format(*wrapped()))
    for model, depth in DEPTHS.items():
        print(f"the decoder of {model} around it, forward and backward: {Layer(depth).microseconds():.0f} us")


if __name__ == "__main__":
    main()
