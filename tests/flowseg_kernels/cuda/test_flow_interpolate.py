"""The tests of flow_interpolate on the emulated CUDA kernels."""

from ..ops.test_flow_interpolate import *  # noqa: F403
