"""Registers ops with PyTorch: schema, fake kernel, backend table, backward rule.

The schemas of the public ops and of the C++ ops are both defined here, in Python, so that the package imports, traces and
falls back when nothing was compiled; C++ only adds kernels to schemas that exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from . import backend
from .extension import why_no_cpu_kernels, why_no_cuda_kernels
from .transforms import define_transforms
from .triton import triton_kernel, why_no_triton

__all__ = ["COMPILED_CHANNELS", "cpu_kernel", "cuda_kernel", "define_op", "no_second_derivative", "triton_kernel"]

#: Code channels that compiled kernels take; the reference takes any number.
COMPILED_CHANNELS = 16

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


def define_op(
    schema: str,
    *,
    fake: Callable,
    backends: dict[str, Callable],
    channels: Callable[..., int],
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: bool = False,
) -> None:
    """Register one op `flowseg::NAME`.

    Args:
        schema: "NAME(Tensor x, ...) -> ..."; a last argument named `backend` is the backend handed on by a forward op.
        fake: output shapes from input shapes.
        backends: implementation by backend name, each taking the op's arguments without `backend`.
        channels: the op's arguments -> number of code channels of the call.
        backward, setup_context: the rule for torch.library.register_autograd.
        autocast: whether floating tensors are cast to autocast's dtype, as for a matrix product. Without it autocast leaves the
            call alone: the per-pixel ops read any dtype and compute in fp32.
    """
    name = schema[: schema.index("(")]
    handed_on = "str backend)" in schema
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    backend.OPS[name] = {key: backend.Implementation(fn, _WHY_NOT[key]) for key, fn in backends.items()}

    def run(*args):
        requested = args[-1] if handed_on else backend.requested_backend()
        if handed_on:
            args = args[:-1]
        chosen = backend.select(name, args[0].device.type, channels(*args), requested)
        return chosen.run(*args)

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
        # fp64 is never cast: whoever computes in it asked for it.
        args = [
            v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dtype != torch.float64 else v
            for v in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return getattr(torch.ops.flowseg, name).default(*args)

    return cast_and_call


def no_second_derivative(name: str) -> dict[str, Callable]:
    """The backward rule of a backward op whose own derivative is not provided: an error that names the op."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"flowseg::{name} has no derivative: second derivatives of this op are not supported. Compute it with the plain "
            f"formula in flowseg_kernels.ops.{name.removesuffix('_bwd')}.reference if you need them."
        )

    return {"backward": backward, "setup_context": lambda ctx, inputs, output: None}


_CHECK_MESSAGE = re.compile(r"flowseg: (.*?)(?:\nException raised|$)", re.DOTALL)


def cpu_kernel(schema: str) -> Callable:
    """Define `flowseg_cpu::NAME`, which csrc/cpu implements, and return a function that calls it.

    Bad values that only the kernel can see (a label out of range) come back as ValueError.
    """
    return _compiled_kernel("flowseg_cpu", schema)


def cuda_kernel(schema: str) -> Callable:
    """Define `flowseg_cuda::NAME`, which csrc/cuda implements, and return a function that calls it."""
    return _compiled_kernel("flowseg_cuda", schema)


def _compiled_kernel(library: str, schema: str) -> Callable:
    name = schema[: schema.index("(")]
    _COMPILED[library].define(schema)

    def call(*args):
        try:
            return getattr(getattr(torch.ops, library), name).default(*args)
        except RuntimeError as error:
            found = _CHECK_MESSAGE.search(str(error))
            if found:
                raise ValueError(found.group(1).strip()) from None
            raise

    return call
