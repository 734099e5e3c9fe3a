"""Triton on the host: whether its kernels can run here, and what their launchers share.

This module does not import Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import shutil
import struct
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "PLANE",
    "STRIDED",
    "VECTOR",
    "aligned",
    "assembly_for",
    "compile_options",
    "elementwise_block",
    "on_device_of",
    "over_blocks",
    "pixel_strides",
    "triton_kernel",
    "two_floats",
    "why_no_triton",
]

#: Triton reads TRITON_INTERPRET at its import. With "1" its kernels run as NumPy code and take CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _why_not_here() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken Triton must not break ops that have other backends
        return f"Triton does not import here ({type(error).__name__}: {error})"
    if INTERPRETED:
        return None
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "Triton compiles a launcher for each kernel and finds no C compiler (gcc, clang, or set CC)"
    if torch.version.hip:
        return None
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    found = torch.cuda.get_device_capability()
    return None if found >= (8, 0) else f"the Triton kernels need compute capability 8.0, this GPU has {found}"


def why_no_triton(device: str) -> str | None:
    """Return None if Triton kernels can run on tensors of this device type here, else the reason in one sentence."""
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return f"Triton kernels take CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs them there, slowly)"
    return _why_not_here()


def triton_kernel(package: str, name: str, module: str = "triton_kernels") -> Callable:
    """Return a function that calls `name` of `package`.`module`. The first call imports the module, as Triton is optional."""

    def call(*args):
        return getattr(importlib.import_module(f"{package}.{module}"), name)(*args)

    return call


#: Memory layout of an image's pixels. STRIDED: any strides. PLANE: one stride for all pixels of a plane.
#: VECTOR: contiguous planes that each start at a multiple of 16 elements.
STRIDED, PLANE, VECTOR = 0, 1, 2


@functools.cache
def _may_bound_registers() -> bool:
    if not torch.cuda.is_available():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] != 10


def compile_options(warps: int, registers: int | None = None, stages: int = 3) -> dict[str, object]:
    """Return the compiler options of a launch.

    Multiply-adds are fused, as in the C++ kernels; since Triton 3.9 this must be requested.

    registers: the most registers per thread. Without this bound ptxas spills in order to run more programs at once. On sm_10x the
        bound itself causes the spills, so it is left out there.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return options | ({"maxnreg": registers} if registers and _may_bound_registers() else {})


def elementwise_block(channels: int) -> int:
    """Return the pixels per program of 128 threads, for kernels that move data and compute little.

    A thread moves 16 bytes of bf16 per channel, less for many channels, to save registers.
    """
    return 4096 if INTERPRETED else 1024 if channels <= 4 else 512 if channels <= 8 else 256


def pixel_strides(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the strides of x (B, ..., H, W) and its pixels' layout: STRIDED, PLANE or VECTOR."""
    strides = list(x.stride())
    height, width = x.shape[-2:]
    if width == 1:
        strides[-1] = strides[-2]  # the stride of an axis of length 1 is arbitrary; this choice makes a plane
    if height != 1 and width != 1 and strides[-2] != strides[-1] * width:
        return tuple(strides), STRIDED
    if strides[-1] == 1 and all(s % 16 == 0 for s in (*strides[:-2], height * width)):
        return tuple(strides), VECTOR
    return tuple(strides), PLANE


def over_blocks(block: int, **inputs: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Return the launch arguments of a kernel whose programs each take `block` pixels of one image of inputs (B, ..., H, W).

    The three parts: the launch grid; all strides in the order of the inputs, then width, pixels and blocks per image; and the
    layout of each input X as the constant X_LAYOUT.
    """
    strides, layouts = [], {}
    for name, tensor in inputs.items():
        found, layouts[f"{name}_LAYOUT"] = pixel_strides(tensor)
        strides += found
    height, width = tensor.shape[-2:]
    blocks = -(-height * width // block)
    return (tensor.shape[0] * blocks,), (*strides, width, height * width, blocks), layouts


def aligned(x: Tensor) -> Tensor:
    """Return the same values, contiguous and 16-byte aligned, for kernels that load 16 bytes at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def two_floats(value: float) -> tuple[float, float]:
    """Split a number into the sum of two fp32 numbers: Triton passes Python floats as fp32, which is too short for fp64 calls."""
    if not math.isfinite(value):
        return value, 0.0
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def assembly_for(dtype: torch.dtype) -> str:
    """Return the inline assembly that kernels use in this dtype, for instructions that Triton does not generate.

    "ptx" (NVIDIA): reciprocals without a range guard, 16-byte loads, predicates. "gcn" (AMD): the reciprocal. "plain": none.
    """
    if INTERPRETED or dtype == torch.float64:
        return "plain"
    return "gcn" if torch.version.hip else "ptx"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of x the current device, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
