"""Registration of decode_confusion. Counts are integers: nothing here is differentiable."""

from __future__ import annotations

import torch

from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from . import reference

_SCHEMA = (
    "decode_confusion(Tensor x, Tensor target, Tensor centroids, Tensor? cells, Tensor? records, Tensor? groups, "
    "float grid_low, float grid_scale, int ignore_index) -> Tensor"
)


define_op(
    _SCHEMA,
    fake=lambda x, target, centroids, *args: torch.empty(
        (centroids.shape[0], centroids.shape[0]), dtype=torch.int64, device=x.device
    ),
    backends={
        "cuda": cuda_kernel(_SCHEMA),
        "cpu": cpu_kernel(_SCHEMA),
        "triton": triton_kernel(__package__, "decode_confusion"),
        "reference": reference.decode_confusion,
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("decode_confusion"),
)
