"""Runs ops as on a machine with an sm_90 GPU, up to the launch of their Triton kernels.

Triton itself is real: it binds the arguments of a launch, selects the kernel's variant, compiles it with ptxas and checks that it
fits the GPU. Only the driver is a stub: it records the launch instead of making it. Tensors are on the CPU; a kernel's results are
uninitialised memory.
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
#: Bytes of shared memory per program on an H100: 227 KiB.
SHARED_MEMORY = 227 * 1024
#: Triton caches compiled kernels by device. A real GPU's device is a number, so this one never hits its cache.
DEVICE = "a pretended one"


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, object]
    metadata: NamedTuple
    cubin: bytes


_recorded: list[Launch] = []


class _Launcher:
    """Stub of the C function that Triton generates per variant of a kernel."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, cubin, packed, described, enter, leave, *arguments):
        kernel = self.source.fn
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        _recorded.append(Launch(kernel.__name__, (x, y, z), named, self.metadata, cubin))


class _Driver:
    """Stub of the driver, as far as Triton 3.6 and 3.9 use it."""

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
    """Inside the block ops run on Triton with CPU tensors. Yields the list of launches so far."""
    _recorded.clear()
    driver.set_active(_Driver())
    try:
        with mock.patch.object(registry, "why_no_triton", lambda device: None), fk.use_backend("triton"):
            yield _recorded
    finally:
        driver.set_active(None)
