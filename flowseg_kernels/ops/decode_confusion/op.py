"""Registration of decode_confusion. Counts are integers: nothing here is differentiable."""

from __future__ import annotations

import torch

from ...decode_grid import grid_of
from ...derived import label_of
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from . import reference

_KERNEL = (
    "decode_confusion(Tensor x, Tensor target, Tensor centroids, Tensor? cells, Tensor? records, Tensor? groups, "
    "float grid_low, float grid_scale, int ignore_index) -> Tensor"
)


def _with_grid(kernel, uses_grid=True):
    def run(x, target, centroids, grid, ignored, ignore_index):
        tables = grid_of(x, centroids, grid and uses_grid)
        return kernel(x, target, centroids, *tables, label_of(ignored, ignore_index))

    return run


define_op(
    "decode_confusion(Tensor x, Tensor target, Tensor centroids, bool grid, Tensor? ignored, int ignore_index) -> Tensor",
    fake=lambda x, target, centroids, *args: torch.empty(
        (centroids.shape[0], centroids.shape[0]), dtype=torch.int64, device=x.device
    ),
    backends={
        "cuda": _with_grid(cuda_kernel(_KERNEL)),
        "cpu": _with_grid(cpu_kernel(_KERNEL)),
        "triton": _with_grid(triton_kernel(__package__, "decode_confusion")),
        "reference": _with_grid(reference.decode_confusion, uses_grid=False),
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("decode_confusion"),
)
