"""`pytest -p tests.host_cuda.plugin`: run the tests of the "cuda" backend, and no others, on kernels compiled for the host."""

import pytest

from . import kernels

# Before tests/conftest.py is imported, which lists the backends that can run here.
kernels.install()

#: Tests that are left out, with the reason.
LEFT_OUT = {
    "test_equals_torchmetrics": "a large image, for kernels that other tests cover",
    "test_fp16_gradients_do_not_vanish_in_large_batches": "400,000 pixels, which need a GPU",
    "test_bitwise_repeatable_over_threads": "about the threads of the C++ kernels",
}


@pytest.fixture(scope="session", autouse=True)
def _compiled():
    """Compile before the first test: its duration then does not include the compiler's."""
    if kernels.why_not() is None:
        kernels.library()


def _runs(item) -> bool:
    is_about_cuda = "cuda" in item.nodeid or "every_required" in item.name
    return is_about_cuda and item.originalname not in LEFT_OUT


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if _runs(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
