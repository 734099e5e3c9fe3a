"""Registers ops with PyTorch: schema, fake kernel, backend table, backward rule.

Python defines the schemas of the public ops and of the compiled ops. So the package imports, traces and falls back to plain
PyTorch when nothing was compiled; the compiled libraries only add kernels to existing schemas.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch

from . import backend
from .extension import why_no_cpu_kernels, why_no_cuda_kernels
from .transforms import define_transforms
from .triton import triton_kernel, why_no_triton

__all__ = [
    "COMPILED_CHANNELS",
    "Limited",
    "cpu_kernel",
    "cuda_kernel",
    "define_op",
    "no_second_derivative",
    "triton_kernel",
]

#: The most code channels that compiled kernels take. The reference takes any number.
COMPILED_CHANNELS = 16

#: The message of a check in csrc, without torch's stack trace.
_CHECK_MESSAGE = re.compile(r"flowseg: (.*?)(?:\nException raised|$)", re.DOTALL)

_LIBRARY = torch.library.Library("flowseg", "FRAGMENT")
_COMPILED = {name: torch.library.Library(name, "FRAGMENT") for name in ("flowseg_cpu", "flowseg_cuda")}
_COMPILED["flowseg_cpu"].define("instruction_set() -> int")


def _why_not_reference(device: str, channels: int) -> str | None:
    return None


def _why_not_cpu(device: str, channels: int) -> str | None:
    if device != "cpu":
        return f"the C++ kernels take CPU tensors, these are on {device}"
    if channels > COMPILED_CHANNELS:
        return f"the C++ kernels take at most {COMPILED_CHANNELS} code channels, these have {channels}"
    return why_no_cpu_kernels()


def _why_not_cuda(device: str, channels: int) -> str | None:
    if device != "cuda":
        return f"the CUDA kernels take CUDA tensors, these are on {device}"
    if channels > COMPILED_CHANNELS:
        return f"the CUDA kernels take at most {COMPILED_CHANNELS} code channels, these have {channels}"
    return why_no_cuda_kernels()


def _why_not_triton(device: str, channels: int) -> str | None:
    if channels > COMPILED_CHANNELS:
        return f"the Triton kernels take at most {COMPILED_CHANNELS} code channels, these have {channels}"
    return why_no_triton(device)


_WHY_NOT = {"reference": _why_not_reference, "cpu": _why_not_cpu, "triton": _why_not_triton, "cuda": _why_not_cuda}


@dataclasses.dataclass(frozen=True)
class Limited:
    """An implementation whose kernels run on fewer devices than their backend, or take fewer calls than their op.

    run:      the function; it passes calls that its kernels do not take to `backend.instead_of`.
    why_not:  () -> None if the kernels can run here, else the reason. It is asked only if the backend has no reason.
    takes:    the calls that its kernels take, in words: "16-bit tensors".
    """

    run: Callable
    why_not: Callable[[], str | None]
    takes: str


def _implementation(name: str, given: Callable | Limited) -> backend.Implementation:
    why_not = _WHY_NOT[name]
    if not isinstance(given, Limited):
        return backend.Implementation(given, why_not)
    return backend.Implementation(given.run, lambda *call: why_not(*call) or given.why_not(), given.takes)


def define_op(
    schema: str,
    *,
    fake: Callable,
    backends: dict[str, Callable | Limited],
    channels: Callable[..., int],
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: bool = False,
) -> None:
    """Register one op `flowseg::NAME`.

    Args:
        schema: "NAME(Tensor x, ...) -> ...". A backward op ends its arguments with `str backend`, the backend of its forward.
        fake: output shapes from input shapes.
        backends: backend name -> implementation, a function of the op's arguments without `backend`, or one with limits.
        channels: the op's arguments -> number of code channels of the call.
        backward, setup_context: the rule for torch.library.register_autograd.
        autocast: whether autocast casts floating tensors to its dtype, as for a matrix product. The per-pixel ops need no cast:
            they read any dtype and compute in fp32.
    """
    name = schema[: schema.index("(")]
    has_backend = "str backend)" in schema
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    backend.OPS[name] = {key: _implementation(key, given) for key, given in backends.items()}

    def run(*args):
        if has_backend:
            *args, requested = args
        else:
            requested = backend.requested_backend()
        chosen = backend.select(name, args[0].device.type, channels(*args), requested)
        try:
            return chosen.run(*args)
        except RuntimeError as error:
            # A compiled kernel reports a bad value, such as a label out of range, by a RuntimeError.
            found = _CHECK_MESSAGE.search(str(error))
            if found:
                raise ValueError(found.group(1).strip()) from None
            raise

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flowseg::{name}", fake, lib=_LIBRARY)
    if autocast:
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, _autocast_kernel(name, device), f"Autocast{device}")
    if backward is not None:
        torch.library.register_autograd(f"flowseg::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        define_transforms(name, _LIBRARY, backward, setup_context, autocast)


def _autocast_kernel(name: str, device: str) -> Callable:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def cast_and_call(*args):
        dtype = torch.get_autocast_dtype(device.lower())
        # fp64 is never cast: the caller chose that precision.
        args = [
            v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dtype != torch.float64 else v
            for v in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return getattr(torch.ops.flowseg, name).default(*args)

    return cast_and_call


def no_second_derivative(name: str) -> dict[str, Callable]:
    """The backward rule of an op without a derivative: an error that names the op."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"flowseg::{name} has no derivative: second derivatives of this op are not supported. Compute it with the plain "
            f"formula in flowseg_kernels.ops.{name.removesuffix('_bwd')}.reference if you need them."
        )

    return {"backward": backward, "setup_context": lambda ctx, inputs, output: None}


def cpu_kernel(schema: str) -> Callable:
    """Define `flowseg_cpu::NAME`, which csrc/cpu implements, and return the op."""
    return _compiled_op("flowseg_cpu", schema)


def cuda_kernel(schema: str) -> Callable:
    """Define `flowseg_cuda::NAME`, which csrc/cuda implements, and return the op."""
    return _compiled_op("flowseg_cuda", schema)


def _compiled_op(library: str, schema: str) -> Callable:
    _COMPILED[library].define(schema)
    return getattr(getattr(torch.ops, library), schema[: schema.index("(")]).default
