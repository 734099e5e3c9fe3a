"""Checks of the whole run. conftest.py sorts the first one to the end."""

import pytest

from flowseg_kernels.runtime.backend import OPS

from . import conftest


def test_every_required_backend_ran():
    """Fail if a backend or proof that `make test` requires was skipped, or if a kernel of a required backend was never called."""
    required = {*conftest.REQUIRED, *conftest.REQUIRED_PROOFS}
    assert required <= conftest.ran, f"required {sorted(required)}, ran {sorted(conftest.ran)}"
    kernels = {(op, name) for op, found in OPS.items() for name in found if name in conftest.REQUIRED}
    never = sorted(kernel for kernel in kernels if conftest.ops_that_ran[kernel] < 1)
    assert not never, f"never called: {never}"


def test_a_required_proof_fails_instead_of_skipping(monkeypatch):
    monkeypatch.setattr(conftest, "ran", set())
    monkeypatch.setattr(conftest, "not_shown", {})
    monkeypatch.setattr(conftest, "REQUIRED_PROOFS", ["emulated"])
    conftest.proof("cuda_code")
    with pytest.raises(pytest.skip.Exception):
        conftest.proof("triton_code", "no Triton")
    with pytest.raises(pytest.fail.Exception, match="no compiler"):
        conftest.proof("emulated", "no compiler")
    assert conftest.ran == {"cuda_code"} and conftest.not_shown == {"triton_code": "no Triton"}
