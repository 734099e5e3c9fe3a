"""Sorted to the end by conftest.py."""

from .conftest import REQUIRED, ran


def test_every_required_backend_ran():
    """`make test` names the backends that must have run; a skipped one is a failure here."""
    assert set(REQUIRED) <= ran, f"required {REQUIRED}, ran {sorted(ran)}"
