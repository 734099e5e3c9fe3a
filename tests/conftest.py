"""The `backend` fixture: a test that uses it runs on each backend that can run here.

FLOWSEG_REQUIRE_BACKENDS is a comma-separated list of backends that must run; `make test` sets it. If one of them cannot run, its
tests fail instead of being skipped. FLOWSEG_REQUIRE_PROOFS does the same for the checks of GPU kernels that need no GPU.
"""

import collections
import contextlib
import functools
import os

# Do not read compiled graphs from a cache on disk: an earlier version of an op may have written them.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# Start no pool of compile workers: Inductor uses them only for Triton code on GPUs, and each one imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime import backend as choosing
from flowseg_kernels.runtime.backend import BACKENDS, backend_reasons
from flowseg_kernels.runtime.extension import HOPPER
from flowseg_kernels.runtime.triton import INTERPRETED

from .host_cuda import kernels as host_kernels
from .support import gpu_arithmetic, interpreter

if INTERPRETED:
    interpreter.speed_up()
    gpu_arithmetic.install()

REQUIRED = [name for name in os.environ.get("FLOWSEG_REQUIRE_BACKENDS", "").split(",") if name]
#: Checks of GPU kernels without a GPU: "emulated" runs the CUDA kernels on the CPU, "cuda_code" and "triton_code" inspect machine
#: code. FLOWSEG_REQUIRE_PROOFS names the ones that must run.
PROOFS = ("emulated", "cuda_code", "triton_code")
REQUIRED_PROOFS = [name for name in os.environ.get("FLOWSEG_REQUIRE_PROOFS", "").split(",") if name]
ran: set[str] = set()
#: (op, backend) -> calls of an op that the backend's kernels took.
ops_that_ran: collections.Counter[tuple[str, str]] = collections.Counter()
not_shown: dict[str, str] = {}


def proof(name, why_not=None):
    """Record that a proof runs. If it cannot (`why_not`): fail if it is required, else skip it and list it at the end."""
    if why_not is None:
        ran.add(name)
    elif name in REQUIRED_PROOFS:
        pytest.fail(f"{name} must be shown here and cannot be: {why_not}")
    else:
        not_shown[name] = why_not
        pytest.skip(why_not)


def device_of(backend):
    """Device type of the tensors on which a backend is tested."""
    on_cpu = {"reference": True, "cpu": True, "triton": INTERPRETED, "cuda": host_kernels.installed()}
    return "cpu" if on_cpu[backend] else "cuda"


def why_not(backend, op="flow_loss"):
    """None when tests of an op can run on a backend here, else the reason."""
    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        return "no GPU here" if backend == "cuda" else "no GPU here, and TRITON_INTERPRET=1 is not set"
    return backend_reasons(op, device_of(backend))[backend]


# Always list the CPU backends, so that a missing one is reported. List the others if they can or must run.
TESTED = [n for n in BACKENDS[::-1] if n in ("reference", "cpu") or n in REQUIRED or why_not(n) is None]


def _recording(select):
    """Add the op and backend of each call to ops_that_ran."""

    @functools.wraps(select)
    def run(op, *args):
        chosen = select(op, *args)
        ops_that_ran.update((op, name) for name, found in choosing.OPS[op].items() if found is chosen)
        return chosen

    return run


def _forgetting(instead_of):
    """Take a call that the kernels of a backend did not take out of ops_that_ran."""

    @functools.wraps(instead_of)
    def run(name, op, *args):
        ops_that_ran.subtract([(op, name)])
        return instead_of(name, op, *args)

    return run


choosing.select = _recording(choosing.select)
choosing.instead_of = _forgetting(choosing.instead_of)


def pytest_addoption(parser):
    parser.addoption("--few-forms", action="store_true", help="run one form in n of each test marked many_forms(n)")
    parser.addoption(
        "--every-variant",
        action="store_true",
        help="compile every form of every kernel for every target, and interpret the kernels at full size",
    )


def pytest_report_header():
    return [f"not tested on {n}: {why_not(n)}" for n in BACKENDS if why_not(n)]


def pytest_terminal_summary(terminalreporter):
    for name, why in not_shown.items():
        terminalreporter.write_line(f"NOT SHOWN HERE: {name}: {why}", yellow=True, bold=True)


@pytest.fixture(params=TESTED)
def backend(request):
    """Run the test inside use_backend(name), with that backend's device as the default device. The value is the name."""
    name = request.param
    reason = why_not(name)
    if name == "cuda" and not reason and "field" in request.node.nodeid:
        reason = why_not(name, "neural_field")
        # No build has the field's kernels for another GPU. A library without them is an error on a GPU that could run them.
        if reason and device_of(name) == "cuda" and torch.cuda.get_device_capability() != HOPPER:
            pytest.skip(reason)
    if reason:
        if name in REQUIRED:
            pytest.fail(f"backend {name} must run here and cannot: {reason}")
        pytest.skip(reason)
    ran.add(name)
    # No device context for the CPU: it would slow every call down.
    device = torch.device("cuda") if device_of(name) == "cuda" else contextlib.nullcontext()
    with device, fk.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@functools.cache
def _codes(classes, device):
    return fk.Codebook(fk.kronecker_centroids(classes, 3, device=device))


@pytest.fixture
def codes150(request):
    """The codebook of 150 classes, on the device of the test's backend."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")
    return _codes(150, torch.get_default_device())


@pytest.fixture
def codes19(request):
    """A smaller codebook, for tests that do not depend on the number of classes."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")
    return _codes(19, torch.get_default_device())


def _sampled(items):
    """Yield one form in n of each test marked many_forms(n): kernels are slow without a GPU, which compiles each form."""
    place = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("many_forms")
        if mark is None or place[item.originalname] % mark.args[0] == 0:
            yield item
        if mark is not None:
            place[item.originalname] += 1


def pytest_collection_modifyitems(config, items):
    if (INTERPRETED or config.getoption("--few-forms")) and not config.getoption("--every-variant"):
        ours = [i for i in items if not INTERPRETED or "triton" in i.name or "every_required" in i.name]
        kept = list(_sampled(ours))
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept
    # Run the check that no required backend was skipped after all other tests.
    items.sort(key=lambda item: item.name == "test_every_required_backend_ran")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "many_forms(n): one form in n runs under the Triton interpreter, or with --few-forms"
    )
    unknown = [name for name in REQUIRED if name not in BACKENDS]
    if unknown:
        raise pytest.UsageError(f"FLOWSEG_REQUIRE_BACKENDS: wanted names of {BACKENDS}; got {unknown}")
    unknown = [name for name in REQUIRED_PROOFS if name not in PROOFS]
    if unknown:
        raise pytest.UsageError(f"FLOWSEG_REQUIRE_PROOFS: wanted names of {PROOFS}; got {unknown}")
