"""Registration of decode_confusion. Counts are integers: nothing here is differentiable."""

from __future__ import annotations

import torch

from ...decode_tables import tables_of
from ...derived import label_of
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from . import reference

_KERNEL = (
    "decode_confusion(Tensor x, Tensor target, Tensor centroids, Tensor[] tables, "
    "float grid_low, float grid_scale, bool by_class, int ignore_index) -> Tensor"
)


#: Bytes of counts above which `run` tries to allocate them first. Kernels report a failure without the reason.
_LARGE = 2**30


def _fits(classes, device):
    """Whether (K, K) counts can be allocated."""
    try:
        torch.empty(classes, classes, dtype=torch.int64, device=device)
    except RuntimeError:
        return False
    return True


def _with_tables(kernel, uses_tables=True):
    """Wrap a kernel: look up the tables of the codes, if it uses them, and the ignored label."""

    def run(x, target, centroids, grid, ignored, ignore_index, by_class=False):
        classes = centroids.shape[0]
        if not by_class and 8 * classes**2 > _LARGE and not _fits(classes, x.device):
            raise RuntimeError(
                f"decode_confusion: the counts of {classes} x {classes} classes take {8 * classes**2 / 1e9:.1f} GB, which are not "
                f"free; with by_class=True they take {24 * classes / 1e6:.1f} MB and are enough for IoU and accuracy"
            )
        tables = tables_of(x, centroids, grid and uses_tables)
        return kernel(x, target, centroids, *tables, by_class, label_of(ignored, ignore_index))

    return run


def _empty(x, target, centroids, grid, ignored, ignore_index, by_class=False):
    classes = centroids.shape[0]
    return torch.empty((3 if by_class else classes, classes), dtype=torch.int64, device=x.device)


define_op(
    "decode_confusion(Tensor x, Tensor target, Tensor centroids, bool grid, Tensor? ignored, int ignore_index, "
    "bool by_class=False) -> Tensor",
    fake=_empty,
    backends={
        "cuda": _with_tables(cuda_kernel(_KERNEL)),
        "cpu": _with_tables(cpu_kernel(_KERNEL)),
        "triton": _with_tables(triton_kernel(__package__, "decode_confusion")),
        "reference": _with_tables(reference.decode_confusion, uses_tables=False),
    },
    channels=lambda x, *args: x.shape[1],
    **no_second_derivative("decode_confusion"),
)
