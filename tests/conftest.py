"""Backends as a test axis: every numeric test runs on each backend that can run here.

FLOWSEG_REQUIRE_BACKENDS (a comma-separated list, set by `make test`) names those that must run; a missing one is then a failure
instead of a skip.
"""

import os

# A compiled graph cached on disk by an earlier version of an op would hide this one's.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.backend import BACKENDS, backend_reasons

REQUIRED = [name for name in os.environ.get("FLOWSEG_REQUIRE_BACKENDS", "").split(",") if name]
CPU_BACKENDS = ("reference", "cpu")
ran: set[str] = set()


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    """Runs the test inside use_backend(name) and gives the name."""
    name = request.param
    reason = backend_reasons("flow_loss", "cpu")[name]
    if reason:
        if name in REQUIRED:
            pytest.fail(f"backend {name} must run here and cannot: {reason}")
        pytest.skip(reason)
    ran.add(name)
    with fk.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def codes150():
    return fk.Codebook(fk.kronecker_centroids(150, 3))


def pytest_collection_modifyitems(items):
    # The check that no required backend was skipped has to see all other tests.
    items.sort(key=lambda item: item.name == "test_every_required_backend_ran")


def pytest_configure(config):
    unknown = [name for name in REQUIRED if name not in BACKENDS]
    if unknown:
        raise pytest.UsageError(f"FLOWSEG_REQUIRE_BACKENDS: wanted names of {BACKENDS}; got {unknown}")
