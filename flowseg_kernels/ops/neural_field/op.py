"""Registration of neural_field and its backward."""

from __future__ import annotations

import math

import torch

from ...runtime.backend import requested_backend
from ...runtime.flops import define_flops
from ...runtime.registry import Limited, cpu_kernel, define_op, triton_kernel
from . import cuda, reference
from .flops import backward_flops, forward_flops

_TENSORS = (
    "Tensor x, Tensor weights, Tensor embed_weight, Tensor embed_bias, Tensor norm_weight, Tensor out_norm_weight, "
    "Tensor out_weight, Tensor out_bias, int patch_size, int mlp_ratio, float eps, "
    "str normalise, str form"
)

_CPU_TENSORS = (
    "Tensor x, Tensor weights, Tensor table, Tensor embed, Tensor norm, Tensor out_norm, Tensor out_weight, Tensor out_bias, "
    "int patch_size, int mlp_ratio, float eps, bool both, bool residual"
)
_forward_cpu = cpu_kernel(f"neural_field({_CPU_TENSORS}) -> Tensor")
_backward_cpu = cpu_kernel(
    f"neural_field_bwd(Tensor grad, {_CPU_TENSORS}, bool need_x, bool need_weights) -> ({', '.join(['Tensor'] * 8)})"
)


def _cpu_arguments(features, x, weights, embed_weight, embed_bias, norm, out_norm, out_weight, out_bias, *options):
    """Return the arguments of the C++ kernels: shared tensors in fp32, and the embedding's constant part as a (Hx, p^2) table."""
    patch_size, mlp_ratio, eps, normalise, form = options
    embed, bias, norm, out_norm, out_weight, out_bias = (
        v.detach().float().contiguous() for v in (embed_weight, embed_bias, norm, out_norm, out_weight, out_bias)
    )
    if weights.stride(-1) != 1:
        # contiguous() does not change the strides of a tensor without elements.
        weights = weights.clone(memory_format=torch.contiguous_format)
    channels = x.shape[1]
    table = embed[:, channels:] @ features.T + bias[:, None]
    return (
        x, weights, table.contiguous(), embed[:, :channels].contiguous(),
        norm, out_norm, out_weight, out_bias, patch_size, mlp_ratio, eps, normalise == "both", form == "residual",
    )  # fmt: skip


def _features(x, embed_weight, patch_size):
    max_freqs = math.isqrt(embed_weight.shape[1] - x.shape[1])
    return reference.cosine_features(patch_size, max_freqs, dtype=torch.float32, device=x.device)


def _run_cpu(x, weights, embed_weight, *rest):
    if x.dtype == torch.float64:
        # The C++ kernels have no fp64. Only gradient checks use it, and they need no speed.
        return reference.neural_field(x, weights, embed_weight, *rest)
    return _forward_cpu(*_cpu_arguments(_features(x, embed_weight, rest[5]), x, weights, embed_weight, *rest))


def _run_cpu_backward(grad, x, weights, embed_weight, *rest):
    *rest, needs = rest
    if x.dtype == torch.float64:
        return reference.neural_field_bwd(grad, x, weights, embed_weight, *rest, needs)
    features = _features(x, embed_weight, rest[5])
    grad_x, grad_weights, position, embed, *others = _backward_cpu(
        grad, *_cpu_arguments(features, x, weights, embed_weight, *rest), needs[0], needs[1]
    )
    shared = (torch.cat((embed, reference.by_features(position.T, features)), dim=1), position.sum(dim=1), *others)
    tensors = (embed_weight, *rest[:5])
    return (
        grad_x,
        grad_weights,
        *(g.reshape(v.shape).to(v.dtype) if need else v.new_empty(0) for g, v, need in zip(shared, tensors, needs[2:])),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    ctx.backend = requested_backend()


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:8])
    grads = torch.ops.flowseg.neural_field_bwd.default(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, needs)), *(None for _ in ctx.options))


define_op(
    f"neural_field({_TENSORS}) -> Tensor",
    fake=lambda x, *args: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    backends={
        "cuda": Limited(cuda.neural_field, cuda.why_not, cuda.TAKES),
        "cpu": _run_cpu,
        "triton": triton_kernel(__package__, "neural_field", "triton_launch"),
        "reference": reference.neural_field,
    },
    channels=lambda x, *args: x.shape[1],
    backward=_backward,
    setup_context=_setup_context,
    autocast=True,
)


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.options, ctx.needs = inputs[9:-2], inputs[-2]


def _second_backward(ctx, *grads):
    """Differentiate the plain formula by autograd: second derivatives are rare, so they have no kernel."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # autograd.grad stops at these views. Without them it would follow one input to another, as the gradient depends on x.
        tensors = [v.view_as(v) if v.requires_grad else v for v in ctx.saved_tensors]
        outs = reference.neural_field_bwd(*tensors, *ctx.options, ctx.needs)
    pairs = [(out, g) for out, g in zip(outs, grads) if out.requires_grad]
    wanted = [v for v in tensors if v.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [g for _, g in pairs], create_graph=again, allow_unused=True
        )
    )
    return (*(next(found) if v.requires_grad else None for v in tensors), *(None for _ in ctx.options), None, None)


def _fake_backward(grad, *args):
    tensors, needs = args[:8], args[-2]
    return tuple(
        torch.empty(v.shape if need else (0,), dtype=v.dtype, device=v.device) for v, need in zip(tensors, needs)
    )


define_op(
    f"neural_field_bwd(Tensor grad, {_TENSORS}, bool[] needs, str backend) -> ({', '.join(['Tensor'] * 8)})",
    fake=_fake_backward,
    backends={
        "cuda": Limited(cuda.neural_field_bwd, cuda.why_not, cuda.TAKES),
        "cpu": _run_cpu_backward,
        "triton": triton_kernel(__package__, "neural_field_bwd", "triton_launch"),
        "reference": reference.neural_field_bwd,
    },
    channels=lambda grad, x, *args: x.shape[1],
    backward=_second_backward,
    setup_context=_keep_inputs,
)

define_flops("neural_field", forward_flops)
define_flops("neural_field_bwd", backward_flops)
