"""Offsets beyond 32 bits in the emulated CUDA kernels."""

from ..ops.test_offsets import *  # noqa: F403
