"""Records that this run inspects the machine code of the Triton kernels."""

import pytest

from ...conftest import proof


@pytest.fixture(autouse=True)
def _recorded(request):
    if request.module.__name__.endswith("test_triton"):
        proof("triton_code")
