"""Backends as a test axis: every numeric test runs on each backend that can run here.

FLOWSEG_REQUIRE_BACKENDS (a comma-separated list, set by `make test`) names those that must run; a missing one is then a failure
instead of a skip. FLOWSEG_REQUIRE_PROOFS does the same for what is shown about GPU kernels without a GPU.
"""

import collections
import contextlib
import functools
import os

# A compiled graph cached on disk by an earlier version of an op would hide this one's.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime import backend as choosing
from flowseg_kernels.runtime.backend import BACKENDS, backend_reasons
from flowseg_kernels.runtime.triton import INTERPRETED

from .host_cuda import kernels as host_kernels
from .support import gpu_arithmetic, interpreter

if INTERPRETED:
    interpreter.speed_up()
    gpu_arithmetic.install()

REQUIRED = [name for name in os.environ.get("FLOWSEG_REQUIRE_BACKENDS", "").split(",") if name]
#: What is shown about GPU kernels without a GPU: "emulated" (CUDA kernels run on the CPU), "cuda_code" and "triton_code" (their
#: machine code). FLOWSEG_REQUIRE_PROOFS names those that must be.
PROOFS = ("emulated", "cuda_code", "triton_code")
REQUIRED_PROOFS = [name for name in os.environ.get("FLOWSEG_REQUIRE_PROOFS", "").split(",") if name]
ran: set[str] = set()
#: (op, backend) of every call that a backend was chosen for.
ops_that_ran: set[tuple[str, str]] = set()
not_shown: dict[str, str] = {}


def proof(name, why_not=None):
    """Notes that a proof runs. With a reason why it cannot: fails where required, else skips, and the run's last lines say so."""
    if why_not is None:
        ran.add(name)
    elif name in REQUIRED_PROOFS:
        pytest.fail(f"{name} must be shown here and cannot be: {why_not}")
    else:
        not_shown[name] = why_not
        pytest.skip(why_not)


def device_of(backend):
    """Device type of the tensors that a backend is tested on."""
    on_cpu = {"reference": True, "cpu": True, "triton": INTERPRETED, "cuda": host_kernels.installed()}
    return "cpu" if on_cpu[backend] else "cuda"


def why_not(backend):
    """None when tests can run on a backend here, else the reason."""
    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        return "no GPU here" if backend == "cuda" else "no GPU here, and TRITON_INTERPRET=1 is not set"
    return backend_reasons("flow_loss", device_of(backend))[backend]


# The CPU's backends always, so that a missing one is seen; the others where they can run or must.
TESTED = [n for n in BACKENDS[::-1] if n in ("reference", "cpu") or n in REQUIRED or why_not(n) is None]


def _noted(select):
    @functools.wraps(select)
    def run(op, *args):
        chosen = select(op, *args)
        ops_that_ran.update((op, name) for name, found in choosing.OPS[op].items() if found is chosen)
        return chosen

    return run


choosing.select = _noted(choosing.select)


def pytest_addoption(parser):
    parser.addoption("--few-forms", action="store_true", help="of tests marked many_forms(n) run one form in n")
    parser.addoption(
        "--every-variant",
        action="store_true",
        help="compile every form of every kernel for every target, and interpret them at full size",
    )


def pytest_report_header():
    return [f"not tested on {n}: {why_not(n)}" for n in BACKENDS if why_not(n)]


def pytest_terminal_summary(terminalreporter):
    for name, why in not_shown.items():
        terminalreporter.write_line(f"NOT SHOWN HERE: {name}: {why}", yellow=True, bold=True)


@pytest.fixture(params=TESTED)
def backend(request):
    """Runs the test inside use_backend(name), with new tensors on that backend's device, and gives the name."""
    name = request.param
    if name == "cuda" and "field" in request.node.nodeid:
        pytest.skip("the neural field has no CUDA kernel")
    reason = why_not(name)
    if reason:
        if name in REQUIRED:
            pytest.fail(f"backend {name} must run here and cannot: {reason}")
        pytest.skip(reason)
    ran.add(name)
    # Entered even for the CPU, a device context would slow every call down.
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
    """A smaller one, for what has nothing to do with the number of classes."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")
    return _codes(19, torch.get_default_device())


def _sampled(items):
    """Interpreted kernels are slow, and a GPU compiles each form anew: of tests marked many_forms(n) one form in n runs."""
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
    # The check that no required backend was skipped has to see all other tests.
    items.sort(key=lambda item: item.name == "test_every_required_backend_ran")


def pytest_configure(config):
    config.addinivalue_line("markers", "many_forms(n): under the Triton interpreter one form in n runs")
    unknown = [name for name in REQUIRED if name not in BACKENDS]
    if unknown:
        raise pytest.UsageError(f"FLOWSEG_REQUIRE_BACKENDS: wanted names of {BACKENDS}; got {unknown}")
    unknown = [name for name in REQUIRED_PROOFS if name not in PROOFS]
    if unknown:
        raise pytest.UsageError(f"FLOWSEG_REQUIRE_PROOFS: wanted names of {PROOFS}; got {unknown}")
