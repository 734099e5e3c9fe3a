"""Registration of distance_correction. Its result is a target: detached, without a derivative."""

from __future__ import annotations

import torch

from ...derived import eps_of, label_of
from ...runtime.checks import unpack
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from . import reference

_KERNEL = (
    "distance_correction(Tensor xhat, Tensor labels, Tensor centroids, float temperature, float eps, int transform, "
    "float max_norm, int ignore_index) -> Tensor"
)


def _resolved(kernel):
    """The op's arguments to those of the formula: numbers, and what follows from the codes."""

    def run(xhat, labels, centroids, temperature, eps, transform, max_norm, ignored, ignore_index, numbers):
        temperature, eps, max_norm = unpack(("temperature", "eps", "max_norm"), [temperature, eps, max_norm], numbers)
        eps, label = eps_of(eps, centroids), label_of(ignored, ignore_index)
        return kernel(xhat, labels, centroids, temperature, eps, transform, max_norm, label)

    return run


def _with_codes(kernel):
    def run(xhat, labels, centroids, temperature, eps, transform, max_norm, ignore_index):
        code = reference.TRANSFORMS.index(transform)
        largest = float("inf") if max_norm is None else max_norm
        return kernel(xhat, labels, centroids, temperature, eps, code, largest, ignore_index)

    return _resolved(run)


define_op(
    "distance_correction(Tensor xhat, Tensor labels, Tensor centroids, float temperature, float? eps, str transform, "
    "float? max_norm, Tensor? ignored, int ignore_index, Tensor? numbers) -> Tensor",
    fake=lambda xhat, *args: torch.empty(xhat.shape, dtype=xhat.dtype, device=xhat.device),
    backends={
        "cuda": _with_codes(cuda_kernel(_KERNEL)),
        "cpu": _with_codes(cpu_kernel(_KERNEL)),
        "triton": _resolved(triton_kernel(__package__, "distance_correction")),
        "reference": _resolved(reference.distance_correction),
    },
    channels=lambda xhat, *args: xhat.shape[1],
    **no_second_derivative("distance_correction"),
)
