"""What the Triton kernels of all ops share on the host: whether they can run, how a tensor is laid out, how a launch looks."""

from __future__ import annotations

import contextlib
import dataclasses
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
    "FLOAT_ARGUMENTS",
    "INTERPRETED",
    "PLANE",
    "STRIDED",
    "VECTOR",
    "Variant",
    "aligned",
    "compile_options",
    "machine_form",
    "on_device_of",
    "over_blocks",
    "pixel_strides",
    "triton_kernel",
    "two_floats",
    "variant",
    "why_no_triton",
]

#: With TRITON_INTERPRET=1 in the environment, when Triton is imported, its kernels run as NumPy and take CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _bounds_registers() -> bool:
    if not torch.cuda.is_available():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] != 10


def compile_options(warps: int, registers: int | None = None, stages: int = 3) -> dict[str, object]:
    """Options of a launch. Products are added with one rounding, as in the C++ kernels; Triton asks to be told since 3.9.

    registers: the most a thread may use. Without it ptxas spills for the sake of more programs at once, with it for sm_10x only.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return options | ({"maxnreg": registers} if registers and _bounds_registers() else {})


#: Names of the kernels' arguments that are numbers and not sizes.
FLOAT_ARGUMENTS = ("eps", "inverse_temperature", "max_norm", "weight", "t_min", "grid_low", "grid_scale")

#: How the pixels of an image lie: any strides; one stride for all pixels; side by side, every plane a multiple of 16 elements.
STRIDED, PLANE, VECTOR = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, for compiling it ahead of time.

    signature: type of each argument ("*fp32", "i64", ...); constants: value of each constexpr one; options: num_warps and so on.
    """

    name: str
    kernel: Callable
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]


def variant(
    name: str, kernel: Callable, pointers: dict[str, str], constants: dict[str, object], options: dict[str, object]
) -> Variant:
    """A Variant whose arguments that are neither pointers (name: element type) nor constants are sizes, or fp32 numbers.

    Sizes are 64-bit here: the form that needs the most registers.
    """

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in pointers:
            return f"*{pointers[argument]}"
        return "fp32" if argument.removesuffix("_low") in FLOAT_ARGUMENTS else "i64"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    return Variant(name, kernel, signature, constants, options)


@functools.cache
def _why_not_here() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken Triton must not break the ops that can do without it
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
    """None when Triton kernels can run on tensors of a device type here, else the reason in one sentence."""
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return f"Triton kernels take CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs them there, slowly)"
    return _why_not_here()


def triton_kernel(package: str, name: str, module: str = "triton_kernels") -> Callable:
    """A function of `package`.triton_kernels that is imported at its first call, as Triton is optional."""

    def call(*args):
        return getattr(importlib.import_module(f"{package}.{module}"), name)(*args)

    return call


def pixel_strides(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Strides of x (B, ..., H, W), and how its pixels lie: STRIDED, PLANE or VECTOR."""
    strides = list(x.stride())
    height, width = x.shape[-2:]
    if width == 1:
        strides[-1] = strides[-2]  # any value is right for an axis of one; this one makes a plane of it
    if height != 1 and width != 1 and strides[-2] != strides[-1] * width:
        return tuple(strides), STRIDED
    if strides[-1] == 1 and all(s % 16 == 0 for s in (*strides[:-2], height * width)):
        return tuple(strides), VECTOR
    return tuple(strides), PLANE


def over_blocks(block: int, **inputs: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """How programs that take `block` pixels of one image each go over inputs (B, ..., H, W): the grid; their strides in order,
    width, pixels and blocks of an image; and the constants X_LAYOUT and so on for inputs named X and so on."""
    strides, layouts = [], {}
    for name, tensor in inputs.items():
        found, layouts[f"{name}_LAYOUT"] = pixel_strides(tensor)
        strides += found
    height, width = tensor.shape[-2:]
    blocks = -(-height * width // block)
    return (tensor.shape[0] * blocks,), (*strides, width, height * width, blocks), layouts


def aligned(codes: Tensor) -> Tensor:
    """Contiguous codes at a 16-byte boundary: kernels read up to four fp32 numbers at once."""
    codes = codes.contiguous()
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


def two_floats(value: float) -> tuple[float, float]:
    """A number as the sum of two fp32 ones: Triton passes Python floats as fp32, and fp64 calls need more of it."""
    if not math.isfinite(value):
        return value, 0.0
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def machine_form(dtype: torch.dtype) -> str:
    """What kernels in this dtype write in the machine's own language, as Triton has no word for it: "ptx" the reciprocal without
    a range guard, 16-byte loads and predicates, "gcn" the reciprocal, "plain" nothing."""
    if INTERPRETED or dtype == torch.float64:
        return "plain"
    return "gcn" if torch.version.hip else "ptx"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
