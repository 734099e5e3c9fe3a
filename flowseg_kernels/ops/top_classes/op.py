"""Registration of top_classes. It has no derivative: flow_loss trains on the same probabilities."""

from __future__ import annotations

import torch

from ...derived import eps_of
from ...runtime.checks import compute_dtype, unpack
from ...runtime.registry import Limited, cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from ..distance_correction.reference import TRANSFORMS
from ..nearest_centroid.op import checked_label
from . import reference

#: The most classes per pixel that compiled kernels keep. The reference keeps any number.
COMPILED_KEPT = 16

_KERNEL = (
    "top_classes(Tensor x, Tensor centroids, float temperature, float eps, int transform, Tensor(a!) labels, "
    "Tensor(b!) probabilities, int ignore_index) -> ()"
)


def _empty(x, centroids, k, temperature, eps, transform, out_dtype, *options):
    shape = (x.shape[0], k, x.shape[2], x.shape[3])
    labels = torch.empty(shape, dtype=getattr(torch, out_dtype), device=x.device)
    return labels, torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)


def _resolved(kernel):
    """Wrap a kernel: unpack tensor-valued numbers, and derive eps and the ignored label from the codes."""

    def run(x, centroids, k, temperature, eps, transform, out_dtype, ignored, ignore_index, numbers):
        temperature, eps = unpack(("temperature", "eps"), [temperature, eps], numbers)
        label = checked_label(centroids, out_dtype, ignored, ignore_index)
        return kernel(x, centroids, k, temperature, eps_of(eps, centroids), transform, out_dtype, label)

    return run


def _few(kernel):
    """A kernel that keeps at most COMPILED_KEPT classes; the reference runs calls for more."""

    def run(x, centroids, k, *options):
        chosen = kernel if k <= COMPILED_KEPT else reference.top_classes
        return chosen(x, centroids, k, *options)

    return Limited(_resolved(run), lambda: None, f"at most {COMPILED_KEPT} classes per pixel")


def _filled(kernel):
    """Wrap a compiled kernel, which takes the transform's number and writes to results that it is given."""

    def run(x, centroids, k, temperature, eps, transform, out_dtype, label):
        results = _empty(x, centroids, k, temperature, eps, transform, out_dtype)
        kernel(x, centroids, temperature, eps, TRANSFORMS.index(transform), *results, label)
        return results

    return _few(run)


define_op(
    "top_classes(Tensor x, Tensor centroids, int k, float temperature, float? eps, str transform, str out_dtype, "
    "Tensor? ignored, int ignore_index, Tensor? numbers) -> (Tensor, Tensor)",
    fake=_empty,
    backends={
        "cuda": _filled(cuda_kernel(_KERNEL)),
        "cpu": _filled(cpu_kernel(_KERNEL)),
        "triton": _few(triton_kernel(__package__, "top_classes")),
        "reference": _resolved(reference.top_classes),
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("top_classes"),
)
