"""Registration of nearest_centroid. Labels are integers: nothing here is differentiable."""

from __future__ import annotations

import torch

from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from ..common import compute_dtype
from . import reference

_ARGUMENTS = (
    "Tensor x, Tensor centroids, Tensor? cells, Tensor? records, Tensor? groups, float grid_low, float grid_scale, "
)
_KERNEL = (
    f"nearest_centroid({_ARGUMENTS}Tensor(a!) labels, Tensor(b!) distance, Tensor(c!) margin, int ignore_index) -> ()"
)


def _empty(
    x, centroids, cells, records, groups, grid_low, grid_scale, out_dtype, return_distance, return_margin, ignore_index
):
    shape = (x.shape[0], x.shape[2], x.shape[3])
    dtype = compute_dtype(x.dtype)
    return (
        torch.empty(shape, dtype=getattr(torch, out_dtype), device=x.device),
        torch.empty(shape if return_distance else (0,), dtype=dtype, device=x.device),
        torch.empty(shape if return_margin else (0,), dtype=dtype, device=x.device),
    )


def _filled(kernel):
    def run(x, centroids, cells, records, groups, grid_low, grid_scale, *options):
        results = _empty(x, centroids, cells, records, groups, grid_low, grid_scale, *options)
        kernel(x, centroids, cells, records, groups, grid_low, grid_scale, *results, options[-1])
        return results

    return run


# A name and no ScalarType: AOTInductor of torch 2.10 and 2.11 hands another dtype to an op than the one that was exported
# (pytorch/pytorch#169157).
define_op(
    f"nearest_centroid({_ARGUMENTS}str out_dtype, bool return_distance, bool return_margin, int ignore_index) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_empty,
    backends={
        "cuda": _filled(cuda_kernel(_KERNEL)),
        "cpu": _filled(cpu_kernel(_KERNEL)),
        "triton": triton_kernel(__package__, "nearest_centroid"),
        "reference": reference.nearest_centroid,
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("nearest_centroid"),
)
