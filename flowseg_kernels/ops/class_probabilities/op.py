"""Registration of class_probabilities. It has no derivative: flow_loss trains on the same probabilities."""

from __future__ import annotations

import torch

from ...derived import eps_of
from ...runtime.checks import compute_dtype, unpack
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from ..distance_correction.reference import TRANSFORMS
from . import reference

_KERNEL = (
    "class_probabilities(Tensor x, Tensor centroids, float temperature, float eps, int transform, int form, "
    "Tensor(a!) out) -> ()"
)


def _empty(x, centroids, *options):
    shape = (x.shape[0], centroids.shape[0], x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)


def _resolved(kernel):
    """Wrap a kernel: unpack tensor-valued numbers, and derive eps from the codes."""

    def run(x, centroids, temperature, eps, transform, form, numbers):
        temperature, eps = unpack(("temperature", "eps"), [temperature, eps], numbers)
        return kernel(x, centroids, temperature, eps_of(eps, centroids), transform, form)

    return run


def _filled(kernel):
    """Wrap a compiled kernel, which takes options as numbers and writes to a result that it is given."""

    def run(x, centroids, temperature, eps, transform, form):
        out = _empty(x, centroids)
        kernel(x, centroids, temperature, eps, TRANSFORMS.index(transform), reference.FORMS.index(form), out)
        return out

    return _resolved(run)


define_op(
    "class_probabilities(Tensor x, Tensor centroids, float temperature, float? eps, str transform, str form, "
    "Tensor? numbers) -> Tensor",
    fake=_empty,
    backends={
        "cuda": _filled(cuda_kernel(_KERNEL)),
        "cpu": _filled(cpu_kernel(_KERNEL)),
        "triton": _resolved(triton_kernel(__package__, "class_probabilities")),
        "reference": _resolved(reference.class_probabilities),
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("class_probabilities"),
)
