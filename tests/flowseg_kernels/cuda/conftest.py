"""The `backend` of this folder: the CUDA kernels, compiled for the host."""

import pytest

import flowseg_kernels as fk

from ...conftest import proof
from ...host_cuda import kernels as host_kernels


@pytest.fixture(scope="session")
def kernels():
    """Compile the kernels for the host and let the "cuda" backend run them."""
    proof("emulated", host_kernels.why_not())
    host_kernels.library()
    host_kernels.install()


@pytest.fixture
def backend(kernels):
    with fk.use_backend("cuda"):
        yield "cuda"
