"""The tests of nearest_centroid on the emulated CUDA kernels."""

from ..ops.test_nearest_centroid import *  # noqa: F403

del test_ten_million_random_points  # noqa: F821  of the CPU kernels
