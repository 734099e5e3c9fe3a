"""Registration of distance_correction. Its result is a target: detached, without a derivative."""

from __future__ import annotations

import torch

from ...runtime.registry import cpu_kernel, define_op, no_second_derivative, triton_kernel
from . import reference

_kernel_cpu = cpu_kernel(
    "distance_correction(Tensor xhat, Tensor labels, Tensor centroids, float temperature, float eps, int transform, "
    "float max_norm, int ignore_index) -> Tensor"
)


def _run_cpu(xhat, labels, centroids, temperature, eps, transform, max_norm, ignore_index):
    return _kernel_cpu(
        xhat,
        labels,
        centroids,
        temperature,
        eps,
        reference.TRANSFORMS.index(transform),
        float("inf") if max_norm is None else max_norm,
        ignore_index,
    )


define_op(
    "distance_correction(Tensor xhat, Tensor labels, Tensor centroids, float temperature, float eps, str transform, "
    "float? max_norm, int ignore_index) -> Tensor",
    fake=lambda xhat, *args: torch.empty(xhat.shape, dtype=xhat.dtype, device=xhat.device),
    backends={
        "cpu": _run_cpu,
        "triton": triton_kernel(__package__, "distance_correction"),
        "reference": reference.distance_correction,
    },
    channels=lambda xhat, *args: xhat.shape[1],
    **no_second_derivative("distance_correction"),
)
