"""Registration of flow_loss and its backward."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ...derived import eps_of, label_of
from ...runtime import backend
from ...runtime.checks import compute_dtype, unpack
from ...runtime.registry import cpu_kernel, cuda_kernel, define_op, no_second_derivative, triton_kernel
from ...runtime.transforms import call, under_transform
from ..distance_correction.reference import TRANSFORMS
from . import reference

_FORWARD = (
    "flow_loss(Tensor prediction, Tensor source, Tensor labels, Tensor t, Tensor centroids, int predicts, int loss_space, "
    "float correction_weight, int schedule, float temperature, float eps, int transform, float max_norm, "
    "int ignore_index, int reduction, float t_min, bool need_grad) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = "flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, int reduction) -> Tensor"
_scale_in_place = cuda_kernel(
    "flow_loss_bwd_(Tensor grad_loss, Tensor(a!) residual, Tensor count, int reduction) -> ()"
)


def _resolved(kernel):
    """Wrap a kernel: unpack tensor-valued numbers, and derive eps and the ignored label from the codes."""
    names = ("correction_weight", "temperature", "eps", "max_norm", "t_min")

    def run(
        prediction, source, labels, t, centroids, predicts, loss_space, correction_weight, schedule, temperature, eps,
        transform, max_norm, ignored, ignore_index, reduction, t_min, numbers, need_grad,
    ):  # fmt: skip
        correction_weight, temperature, eps, max_norm, t_min = unpack(
            names, [correction_weight, temperature, eps, max_norm, t_min], numbers
        )
        # Without correction eps is unused.
        eps = eps_of(eps, centroids) if correction_weight else 1.0
        return kernel(
            prediction, source, labels, t, centroids, predicts, loss_space, correction_weight, schedule, temperature, eps,
            transform, max_norm, label_of(ignored, ignore_index), reduction, t_min, need_grad,
        )  # fmt: skip

    return run


def _options_as_ints(kernel):
    """Wrap a compiled kernel, which takes numbers for options and infinity for no max_norm."""

    def run(
        prediction, source, labels, t, centroids, predicts, loss_space, correction_weight, schedule, temperature, eps,
        transform, max_norm, ignore_index, reduction, t_min, need_grad,
    ):  # fmt: skip
        return kernel(
            prediction, source, labels, t, centroids,
            reference.SPACES.index(predicts), reference.SPACES.index(loss_space),
            correction_weight, reference.SCHEDULES.index(schedule), temperature, eps, TRANSFORMS.index(transform),
            float("inf") if max_norm is None else max_norm, ignore_index, reference.REDUCTIONS.index(reduction),
            t_min, need_grad,
        )  # fmt: skip

    return _resolved(run)


def _backward_options_as_ints(kernel):
    return lambda grad_loss, residual, count, prediction, reduction: kernel(
        grad_loss, residual, count, reference.REDUCTIONS.index(reduction)
    )


def _fake(prediction, source, labels, t, centroids, *options):
    reduction, _, _, need_grad = options[-4:]
    dtype = compute_dtype(prediction.dtype)
    shape = labels.shape if reduction == "none" else ()
    return (
        torch.empty(shape, dtype=dtype, device=prediction.device),
        torch.empty(prediction.shape if need_grad else (0,), dtype=prediction.dtype, device=prediction.device),
        torch.empty((), dtype=torch.int64, device=prediction.device),
    )


def _setup_context(ctx, inputs, output):
    _, residual, count = output
    ctx.mark_non_differentiable(residual, count)
    ctx.set_materialize_grads(False)
    # The backward does not read the prediction. Saving it keeps it in the graph: otherwise a second derivative would silently be
    # zero instead of an error.
    ctx.save_for_backward(residual, count, inputs[0])
    ctx.reduction, _, _, ctx.need_grad = inputs[-4:]
    ctx.backend = backend.requested_backend()


# Private API: torch has no public way to ask whether the graph is retained. Without it the backward always scales the residual.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# Private API: batched gradients of grad(..., is_grads_batched=True) have the type of plain tensors. Nothing else tells them apart.
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)


def _is_last_reader(residual, grad_loss, reduction):
    """Return whether this backward is the last reader of the residual, which may then become the gradient. Only in eager code.

    A CUDA graph keeps the answer of its capture, so its backward must be replayed at most once per forward.
    """
    return (
        reduction != "none"
        and type(grad_loss) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not under_transform(grad_loss, residual)
        and not _is_batched(grad_loss)
        and not _keeps_graph()
    )


def _residual_as_gradient(residual, count, grad_loss, reduction, requested):
    """Return the residual if it already is the gradient or a kernel can scale it in place, else None.

    On a CPU reading grad_loss and count is free. On a GPU the kernel reads them, as Python would wait for the device.
    """
    if not _is_last_reader(residual, grad_loss, reduction):
        return None
    chosen = backend.select("flow_loss_bwd", residual.device.type, residual.shape[1], requested)
    if chosen is backend.OPS["flow_loss_bwd"]["cuda"]:
        _scale_in_place(grad_loss, residual, count, reference.REDUCTIONS.index(reduction))
        return residual
    is_cpu = residual.device.type == "cpu"
    return residual if is_cpu and grad_loss.item() == 1 and (reduction == "sum" or count.item() == 1) else None


def _backward(ctx, grad_loss, grad_residual, grad_count):
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return (None,) * 19
    if not ctx.need_grad:
        raise RuntimeError("flowseg::flow_loss: backward needs the op to have been called with need_grad=True")
    residual, count, prediction = ctx.saved_tensors
    grad = _residual_as_gradient(residual, count, grad_loss, ctx.reduction, ctx.backend)
    if grad is None:
        grad = call("flow_loss_bwd", grad_loss, residual, count, prediction, ctx.reduction, ctx.backend)
    return (grad, *(None,) * 18)


define_op(
    "flow_loss(Tensor prediction, Tensor source, Tensor labels, Tensor t, Tensor centroids, str predicts, str loss_space, "
    "float correction_weight, str schedule, float temperature, float? eps, str transform, float? max_norm, Tensor? ignored, "
    "int ignore_index, str reduction, float t_min, Tensor? numbers, bool need_grad) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backends={
        "cuda": _options_as_ints(cuda_kernel(_FORWARD)),
        "cpu": _options_as_ints(cpu_kernel(_FORWARD)),
        "triton": _resolved(triton_kernel(__package__, "flow_loss")),
        "reference": _resolved(reference.flow_loss),
    },
    channels=lambda prediction, *args: prediction.shape[1],
    backward=_backward,
    setup_context=_setup_context,
)

define_op(
    "flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, Tensor prediction, str reduction, str backend) -> Tensor",
    fake=lambda grad_loss, residual, *args: torch.empty(residual.shape, dtype=residual.dtype, device=residual.device),
    backends={
        "cuda": _backward_options_as_ints(cuda_kernel(_BACKWARD)),
        "cpu": _backward_options_as_ints(cpu_kernel(_BACKWARD)),
        "triton": triton_kernel(__package__, "flow_loss_bwd"),
        "reference": lambda grad_loss, residual, count, prediction, reduction: reference.flow_loss_bwd(
            grad_loss, residual, count, reduction
        ),
    },
    channels=lambda grad_loss, residual, *args: residual.shape[1],
    **no_second_derivative("flow_loss_bwd"),
)
