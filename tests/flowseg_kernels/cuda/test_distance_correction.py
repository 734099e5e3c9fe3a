"""The tests of distance_correction on the emulated CUDA kernels."""

from ..ops.test_distance_correction import *  # noqa: F403
