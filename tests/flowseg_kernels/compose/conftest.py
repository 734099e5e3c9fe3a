"""Fixtures: the decoder must compose with PyTorch with and without chunks of patches."""

import pytest


@pytest.fixture(params=[None, 2], ids=["whole", "chunks"])
def patch_chunk(request):
    """Patches per chunk of the decoder; None is all patches at once."""
    return request.param
