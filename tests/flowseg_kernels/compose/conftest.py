"""The decoder composes with PyTorch whether it generates all weights at once or by chunks of patches."""

import pytest


@pytest.fixture(params=[None, 2], ids=["whole", "chunks"])
def patch_chunk(request):
    """Patches per chunk of the decoder; None generates the weights of all patches at once."""
    return request.param
