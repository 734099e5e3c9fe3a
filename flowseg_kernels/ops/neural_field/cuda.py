"""The neural field's CUDA C++ kernels: which calls they take, and their arguments. All other calls run on the next backend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...runtime import backend
from ...runtime.extension import HOPPER, why_no_hopper_kernels
from ...runtime.registry import cuda_kernel
from ...runtime.triton import aligned

__all__ = ["TAKES", "neural_field", "neural_field_bwd", "takes", "why_not"]

#: The calls that pass `takes`, in words.
TAKES = "bf16 or fp16 tensors, Hx a multiple of 8 up to 128"

_MOST_HIDDEN = 128

#: The kernels count the bytes of a patch's state in 32 bits, and the pixels of a row of patches too.
_LARGEST_PATCH = 2048
_MOST_PIXELS = 2**31 - 1

_TENSORS = (
    "Tensor x, Tensor weights, Tensor embed_weight, Tensor embed_bias, Tensor norm_weight, Tensor out_norm_weight, "
    "Tensor out_weight, Tensor out_bias, int patch_size, int mlp_ratio, float eps, bool both, bool residual"
)
_forward = cuda_kernel(f"neural_field({_TENSORS}) -> Tensor")
_backward = cuda_kernel(f"neural_field_bwd(Tensor grad, {_TENSORS}) -> ({', '.join(['Tensor'] * 8)})")


def why_not() -> str | None:
    """None if the kernels can run here, else the reason."""
    return why_no_hopper_kernels("neural_field")


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == HOPPER


def takes(patch_size: int, *tensors: Tensor) -> bool:
    """Whether the kernels take a call with these tensors: x, weights, embed_weight, embed_bias, and the rest in any order.

    All have one 16-bit dtype, and x has pixels. The device is asked too: a process may have GPUs of several kinds.
    """
    x, _, _, embed_bias, *_ = tensors
    hidden = embed_bias.shape[0]
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and all(v.dtype == x.dtype for v in tensors)
        and hidden % 8 == 0
        and 8 <= hidden <= _MOST_HIDDEN
        and x.numel() > 0
        and patch_size <= _LARGEST_PATCH
        and patch_size * x.shape[3] <= _MOST_PIXELS
        and (not x.is_cuda or _is_hopper(x.device.index))
    )


def _kernel_arguments(x, *rest) -> tuple:
    """The op's arguments as the kernels take them: all tensors but x contiguous and aligned, and the options as booleans."""
    *shared, patch_size, mlp_ratio, eps, normalise, form = rest
    return (x, *map(aligned, shared), patch_size, mlp_ratio, eps, normalise == "both", form == "residual")


def neural_field(x: Tensor, *rest) -> Tensor:
    """Return the same as reference.neural_field."""
    if not takes(rest[7], x, *rest[:7]):
        return backend.instead_of("cuda", "neural_field", x.device.type, x.shape[1]).run(x, *rest)
    return _forward(*_kernel_arguments(x, *rest))


def neural_field_bwd(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor, ...]:
    """Return the same as reference.neural_field_bwd: gradients of the eight tensors, empty where not needed."""
    if not takes(rest[7], x, *rest[:7], grad):
        return backend.instead_of("cuda", "neural_field_bwd", x.device.type, x.shape[1]).run(grad, x, *rest)
    *inputs, needs = rest
    found = _backward(grad, *_kernel_arguments(x, *inputs))
    return tuple(f if need else f.new_empty(0) for f, need in zip(found, needs))
