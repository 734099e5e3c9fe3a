"""Registration of flow_interpolate and its backward."""

from __future__ import annotations

import torch

from ...derived import label_of
from ...runtime.backend import requested_backend
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from ...runtime.transforms import call
from . import reference

_FORWARD = "flow_interpolate(Tensor source, Tensor labels, Tensor t, Tensor centroids, {}int ignore_index) -> Tensor"
_BACKWARD = (
    "flow_interpolate_bwd(Tensor grad, Tensor source, Tensor labels, Tensor t, Tensor centroids, {}int ignore_index, "
    "bool need_t{}) -> (Tensor, Tensor)"
)


def _forward(kernel):
    def run(source, labels, t, centroids, ignored, ignore_index):
        return kernel(source, labels, t, centroids, label_of(ignored, ignore_index))

    return run


def _gradients(kernel):
    def run(grad, source, labels, t, centroids, ignored, ignore_index, need_t):
        return kernel(grad, source, labels, t, centroids, label_of(ignored, ignore_index), need_t)

    return run


def _setup_context(ctx, inputs, output):
    source, labels, t, centroids, ignored, ctx.ignore_index = inputs
    ctx.save_for_backward(source, labels, t, centroids, ignored)
    ctx.backend = requested_backend()


def _backward(ctx, grad):
    need_t = ctx.needs_input_grad[2]
    grad_source, grad_t = call("flow_interpolate_bwd", grad, *ctx.saved_tensors, ctx.ignore_index, need_t, ctx.backend)
    return grad_source if ctx.needs_input_grad[0] else None, None, grad_t if need_t else None, None, None, None


define_op(
    _FORWARD.format("Tensor? ignored, "),
    fake=lambda source, *args: torch.empty(source.shape, dtype=source.dtype, device=source.device),
    backends={
        "cuda": _forward(cuda_kernel(_FORWARD.format(""))),
        "cpu": _forward(cpu_kernel(_FORWARD.format(""))),
        "triton": _forward(triton_kernel(__package__, "flow_interpolate")),
        "reference": _forward(reference.flow_interpolate),
    },
    channels=lambda source, *args: source.shape[1],
    backward=_backward,
    setup_context=_setup_context,
)


def _fake_backward(grad, source, labels, t, centroids, ignored, ignore_index, need_t, backend):
    grad_source = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    return grad_source, t.new_empty(t.shape if need_t else (0,))


define_op(
    _BACKWARD.format("Tensor? ignored, ", ", str backend"),
    fake=_fake_backward,
    backends={
        "cuda": _gradients(cuda_kernel(_BACKWARD.format("", ""))),
        "cpu": _gradients(cpu_kernel(_BACKWARD.format("", ""))),
        "triton": _gradients(triton_kernel(__package__, "flow_interpolate_bwd")),
        "reference": _gradients(reference.flow_interpolate_bwd),
    },
    channels=lambda grad, source, *args: source.shape[1],
    **no_second_derivative("flow_interpolate_bwd"),
)
