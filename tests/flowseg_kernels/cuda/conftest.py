"""The `backend` of this folder: the CUDA kernels, run on the CPU."""

import dataclasses
import os

import pytest

import flowseg_kernels as fk
from flowseg_kernels.runtime import backend as runtime

from . import emulated


@pytest.fixture(scope="session")
def kernels():
    """Builds the kernels for the CPU, or skips; FLOWSEG_REQUIRE_EMULATION=1 (set by `make test`) makes the skip a failure."""
    reason = emulated.why_not()
    if reason:
        if os.environ.get("FLOWSEG_REQUIRE_EMULATION") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
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
