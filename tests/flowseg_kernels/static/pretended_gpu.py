"""Calls ops as on a machine with an sm_90 GPU, up to the launch of their Triton kernels.

Triton itself runs: it binds the arguments of a launch, chooses the kernel's form by them, compiles that with ptxas and sees whether
it fits the GPU. Only its driver is pretended, which notes the launch instead of making it. Tensors are on the CPU; what a kernel
would have written holds whatever memory held.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import flowseg_kernels as fk
from flowseg_kernels.runtime import registry

__all__ = ["SHARED_MEMORY", "TARGET", "Launch", "launches"]

TARGET = GPUTarget("cuda", 90, 32)
#: Bytes that a program may have of an H100's shared memory: 227 KiB.
SHARED_MEMORY = 227 * 1024
#: No number, as a real GPU has: by it Triton keeps the kernels that it compiled.
DEVICE = "a pretended one"


class Launch(NamedTuple):
    """What a GPU would have been given."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, object]
    metadata: NamedTuple
    cubin: bytes


_noted: list[Launch] = []


class _Launcher:
    """In place of the function that Triton writes in C for each form of a kernel."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, cubin, packed, described, enter, leave, *arguments):
        kernel = self.source.fn
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        _noted.append(Launch(kernel.__name__, (x, y, z), named, self.metadata, cubin))


class _Driver:
    """What Triton 3.6 and 3.9 ask of a driver."""

    launcher_cls = _Launcher
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
        # module, function, registers, spills, threads of a program
        load_binary=lambda name, cubin, shared, device: (cubin, cubin, 0, 0, 1024),
    )

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Inside the block ops run on Triton with CPU tensors; gives the list of the kernels launched so far."""
    _noted.clear()
    driver.set_active(_Driver())
    try:
        with mock.patch.object(registry, "why_no_triton", lambda device: None), fk.use_backend("triton"):
            yield _noted
    finally:
        driver.set_active(None)
