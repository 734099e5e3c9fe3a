"""The `backend` of this folder: the CUDA kernels, run on the CPU."""

import dataclasses

import pytest

import flowseg_kernels as fk
from flowseg_kernels.runtime import backend as runtime

from ...conftest import proof
from . import emulated


@pytest.fixture(scope="session")
def kernels():
    """Builds the kernels for the CPU."""
    proof("emulated", emulated.why_not())
    emulated.library()


@pytest.fixture
def backend(kernels, monkeypatch):
    """Runs the test on the emulated kernels, whatever device the "cuda" backend takes otherwise."""
    for op, implementations in runtime.OPS.items():
        if "cuda" in implementations:
            run = dataclasses.replace(implementations["cuda"], why_not=lambda device, channels: None)
            monkeypatch.setitem(runtime.OPS[op], "cuda", run)
    with fk.use_backend("cuda"):
        yield "cuda"
