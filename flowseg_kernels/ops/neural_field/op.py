"""Registration of neural_field and its backward."""

from __future__ import annotations

import torch

from ...runtime.backend import requested_backend
from ...runtime.registry import define_op, no_second_derivative
from . import reference

_TENSORS = (
    "Tensor x, Tensor weights, Tensor embed_weight, Tensor embed_bias, Tensor norm_weight, Tensor out_norm_weight, "
    "Tensor out_weight, Tensor out_bias, int patch_size, int mlp_ratio, float eps, "
    "str normalise, str form"
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    ctx.backend = requested_backend()


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:8])
    grads = torch.ops.flowseg.neural_field_bwd(grad, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, needs)), *(None for _ in ctx.options))


define_op(
    f"neural_field({_TENSORS}) -> Tensor",
    fake=lambda x, *args: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    backends={"reference": reference.neural_field},
    channels=lambda x, *args: x.shape[1],
    backward=_backward,
    setup_context=_setup_context,
    autocast=True,
)


def _fake_backward(grad, *args):
    tensors, needs = args[:8], args[-2]
    return tuple(
        torch.empty(v.shape if need else (0,), dtype=v.dtype, device=v.device) for v, need in zip(tensors, needs)
    )


define_op(
    f"neural_field_bwd(Tensor grad, {_TENSORS}, bool[] needs, str backend) -> ({', '.join(['Tensor'] * 8)})",
    fake=_fake_backward,
    backends={"reference": reference.neural_field_bwd},
    channels=lambda grad, x, *args: x.shape[1],
    **no_second_derivative("neural_field_bwd"),
)
