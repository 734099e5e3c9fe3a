"""Notes that the machine code of the Triton kernels is looked at."""

import pytest

from ...conftest import proof


@pytest.fixture(autouse=True)
def _noted(request):
    if request.module.__name__.endswith("test_triton"):
        proof("triton_code")
