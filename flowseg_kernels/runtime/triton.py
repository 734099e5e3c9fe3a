"""Whether Triton kernels can run here, and why not; and how the modules that hold them are imported."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

__all__ = ["INTERPRETED", "triton_kernel", "why_no_triton"]

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
