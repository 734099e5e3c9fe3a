"""The `backend` of this folder: the CUDA kernels, compiled for the host."""

import pytest

import flowseg_kernels as fk

from ...conftest import proof
from ...host_cuda import kernels as host_kernels


@pytest.fixture(scope="session")
def kernels():
    """Compile the kernels for the host."""
    proof("emulated", host_kernels.why_not())
    host_kernels.library()


@pytest.fixture
def backend(kernels):
    was_installed = host_kernels.installed()
    host_kernels.install()
    try:
        with fk.use_backend("cuda"):
            yield "cuda"
    finally:
        if not was_installed:
            host_kernels.uninstall()
