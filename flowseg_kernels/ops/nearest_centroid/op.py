"""Registration of nearest_centroid. Labels are integers: nothing here is differentiable."""

from __future__ import annotations

import torch

from ...decode_tables import tables_of
from ...derived import label_of
from ...runtime.checks import compute_dtype
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from . import reference

_KERNEL = (
    "nearest_centroid(Tensor x, Tensor centroids, Tensor[] tables, float grid_low, float grid_scale, "
    "Tensor(a!) labels, Tensor(b!) distance, Tensor(c!) margin, int ignore_index) -> ()"
)


def _empty(x, centroids, grid, out_dtype, return_distance, return_margin, ignored, ignore_index):
    shape = (x.shape[0], x.shape[2], x.shape[3])
    dtype = compute_dtype(x.dtype)
    return (
        torch.empty(shape, dtype=getattr(torch, out_dtype), device=x.device),
        torch.empty(shape if return_distance else (0,), dtype=dtype, device=x.device),
        torch.empty(shape if return_margin else (0,), dtype=dtype, device=x.device),
    )


def checked_label(centroids, out_dtype, ignored, ignore_index):
    """Return the ignored label. Raise ValueError if the results' dtype cannot represent this label or a class."""
    label, dtype, last = label_of(ignored, ignore_index), getattr(torch, out_dtype), centroids.shape[0] - 1
    limits = torch.iinfo(dtype)
    if last > limits.max or not limits.min <= label <= limits.max:
        raise ValueError(f"out_dtype: wanted one that holds classes up to {last} and ignore_index {label}; got {dtype}")
    return label


def _filled(kernel):
    """Wrap a compiled kernel, which writes to results that it is given."""

    def run(x, centroids, grid, *options):
        results = _empty(x, centroids, grid, *options)
        label = checked_label(centroids, options[0], *options[-2:])
        kernel(x, centroids, *tables_of(x, centroids, grid, options[2]), *results, label)
        return results

    return run


def _returned(kernel, uses_grid):
    """Wrap an implementation in Python, which returns its results."""

    def run(x, centroids, grid, *options):
        label = checked_label(centroids, options[0], *options[-2:])
        return kernel(x, centroids, *tables_of(x, centroids, grid and uses_grid, options[2]), *options[:-2], label)

    return run


# out_dtype is a string: AOTInductor of torch 2.10 and 2.11 passes a ScalarType other than the exported one
# (pytorch/pytorch#169157).
define_op(
    "nearest_centroid(Tensor x, Tensor centroids, bool grid, str out_dtype, bool return_distance, bool return_margin, "
    "Tensor? ignored, int ignore_index) -> (Tensor, Tensor, Tensor)",
    fake=_empty,
    backends={
        "cuda": _filled(cuda_kernel(_KERNEL)),
        "cpu": _filled(cpu_kernel(_KERNEL)),
        "triton": _returned(triton_kernel(__package__, "nearest_centroid"), uses_grid=True),
        "reference": _returned(reference.nearest_centroid, uses_grid=False),
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("nearest_centroid"),
)
