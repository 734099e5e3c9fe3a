"""Offsets beyond 32 bits in the emulated CUDA kernels."""

from ..ops.test_offsets import test_offsets_beyond_32_bits  # noqa: F401
