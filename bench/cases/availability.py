"""Skips of entries that cannot run here."""

import pytest

from flowseg_kernels.runtime.backend import backend_reasons

from ..settings import DEVICE, QUICK, backend_name


def peer(module):
    """The module of a peer, or a skip that says how to install it."""
    return pytest.importorskip(module, reason=f"{module} is not installed; `make bench` installs it")


def skip_unless_it_runs(entry, op="flow_loss"):
    """Skip, with the reason, an entry that this run leaves out or that cannot run here."""
    if QUICK and entry in ("torch.compile", "KeOps", "cdist+argmin compiled"):
        pytest.skip("the short form leaves out peers that compile")
    if DEVICE == "cuda" and entry in ("faiss IndexFlatL2", "scipy cKDTree", "Pillow quantize"):
        pytest.skip("runs on a CPU only")
    name = backend_name(entry)
    if name and (reason := backend_reasons(op, DEVICE)[name]):
        pytest.skip(f"{name}: {reason}")
