import pytest
import torch

from flowseg_kernels.runtime.triton import INTERPRETED


@pytest.fixture
def brief(backend, request):
    """Whether to test fewer and smaller cases: in the slow interpreter or host build, unless --every-variant is given."""
    slow = INTERPRETED if backend == "triton" else backend == "cuda" and torch.get_default_device().type == "cpu"
    return slow and not request.config.getoption("--every-variant")
