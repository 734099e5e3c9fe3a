"""The tests of decode_confusion on the emulated CUDA kernels."""

from ..ops.test_decode_confusion import *  # noqa: F403

del test_equals_torchmetrics  # noqa: F821  a large image, of the same kernel as the others
