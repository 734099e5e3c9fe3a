"""Launches of the neural field's Triton kernels, with bounded scratch memory and one sum over all partial sums at the end.

Small calls are bound by this host code, not by the GPU. A backward of up to 4,096 patches makes the same few launches and calls of
PyTorch for any number of patches (tests/flowseg_kernels/static/test_field_host.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...runtime.triton import on_device_of
from . import reference
from .triton_backward import backward_kernel, enter_kernel, finish_kernel
from .triton_forward import forward_kernel, table_kernel
from .triton_settings import (
    TABLE_BLOCK,
    Sizes,
    launch_of,
    matmul_path_of,
    patches_per_group,
    patches_per_round,
    scratch_of,
    settings_of,
    states_fit_in_gradients,
    takes,
    tiles_of,
    tiles_per_program,
)

__all__ = ["neural_field", "neural_field_bwd"]


class _Call:
    """One call: its sizes, and its tensors in the layout that the kernels take."""

    def __init__(
        self, x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias, p, ratio, eps,
        normalise, form,
    ):  # fmt: skip
        self.tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
        shared = (v.contiguous() for v in self.tensors[1:])
        self.x = x
        self.weights, self.embed, self.bias, self.gains, self.out_gain, self.out_weight, self.out_bias = shared
        batch, channels, height, width = x.shape
        self.eps = eps
        self.columns = width // p
        self.per_image = self.columns * (height // p)
        self.patches = batch * self.per_image
        self.depth = weights.shape[2]
        hidden = embed_bias.shape[0]
        inner = ratio * hidden
        dtypes = {v.dtype for v in self.tensors}
        operand = x.dtype if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        matmul_path = matmul_path_of(x.device.index) if x.is_cuda else "warp_groups"
        aliased = states_fit_in_gradients(hidden, inner, p, operand, weights.dtype)
        both, residual = normalise == "both", form == "residual"
        self.sizes = Sizes(hidden, inner, p, channels, operand, both, residual, precision, matmul_path, aliased)
        self.freqs = math.isqrt(embed_weight.shape[1] - channels)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def table(self, waves: Tensor | None = None) -> Tensor:
        """Return what the embedding adds at each pixel of every patch, (p^2, Hx). Fill `waves` (p^2, F^2) with cosine features."""
        pixels = self.sizes.p**2
        found = self.empty(pixels, self.sizes.hidden)
        table_kernel[(-(-pixels // TABLE_BLOCK),)](
            self.embed, self.bias, found, waves, self.freqs, **launch_of("table", self.sizes)
        )
        return found

    def forward(
        self, kernel: str, patches: int, table, inverse_lengths, first: int, *, out=None, grad=None, scratch=(None,) * 5, sums=0,
    ) -> None:  # fmt: skip
        """Run forward_kernel on some patches: as "forward" into `out`, or as "states" from `grad` into `scratch`."""
        sizes = self.sizes
        tiles = tiles_per_program(patches, sizes.p**2, settings_of(kernel, sizes).rows)
        states, later_states, inverse_rms, grads, partials = scratch
        forward_kernel[(patches * tiles_of(kernel, sizes) // tiles,)](
            self.x, self.weights, self.embed, table, self.gains, self.out_gain, self.out_weight,
            None if out is None else self.out_bias, out, grad, states, later_states, inverse_rms, inverse_lengths, grads, partials,
            first, self.columns, self.per_image, self.depth, self.embed.shape[1], sums, *self.x.stride(),
            *(self.x if grad is None else grad).stride(), self.eps, **launch_of(kernel, sizes, tiles),
        )  # fmt: skip


def neural_field(x: Tensor, weights: Tensor, embed_weight: Tensor, embed_bias: Tensor, *rest) -> Tensor:
    """Return the same as reference.neural_field, which runs where these kernels cannot: fp64, and Hx above 128."""
    call = _Call(x, weights, embed_weight, embed_bias, *rest)
    if not takes(call.sizes):
        return reference.neural_field(x, weights, embed_weight, embed_bias, *rest)
    out = call.empty(*x.shape, dtype=x.dtype)
    if out.numel() == 0:
        return out
    with on_device_of(x):
        table = call.table()
        inverse_lengths = call.empty(call.patches, call.depth, call.sizes.inner + call.sizes.hidden)
        call.forward("forward", call.patches, table, inverse_lengths, 0, out=out)
    return out


class _Backward:
    """Backward of one call: scratch memory of a round, and partial sums that are added at the end.

    `by_patch` has a row of partial sums per patch, from forward_kernel and backward_kernel. `by_group` has a row per group of
    patches, from enter_kernel.
    """

    def __init__(self, call: _Call, grad: Tensor):
        self.call, self.grad = call, grad
        sizes, depth = call.sizes, call.depth
        per_patch, grads_dtype = scratch_of(sizes, depth)
        self.per_round = count = patches_per_round(call.patches, per_patch.bytes(sizes.operand, grads_dtype))
        self.states = call.empty(count, per_patch.state, dtype=sizes.operand)
        self.grads = call.empty(count, per_patch.state, dtype=grads_dtype)
        self.inverse_rms = call.empty(count, per_patch.inverse_rms)
        self.inverse_lengths = call.empty(count, per_patch.inverse_lengths)
        self.scratch_sums = call.empty(count, per_patch.sums)
        self.grad_x, self.grad_weights = (call.empty(*v.shape, dtype=v.dtype) for v in call.tensors[:2])
        self.later_states = (
            self.grad_weights if sizes.aliased else call.empty(count, per_patch.later_states, dtype=sizes.operand)
        )
        self.per_group = patches_per_group(call.patches)
        self.tiles = {kernel: tiles_of(kernel, sizes) for kernel in ("states", "enter")}
        by_tile = (1 + sizes.channels) * sizes.hidden + sizes.channels
        self.by_patch = call.empty(call.patches, depth * sizes.hidden + self.tiles["states"] * by_tile)
        groups = sum(-(-now // self.per_group) for _, now in self.rounds())
        by_unit = sizes.p**2 + self.tiles["enter"] * sizes.channels
        self.by_group = call.empty(groups, by_unit * sizes.hidden)
        self.waves = call.empty(sizes.p**2, call.freqs**2)

    def rounds(self) -> Iterator[tuple[int, int]]:
        """Yield the first patch and the number of patches of each round."""
        for first in range(0, self.call.patches, max(self.per_round, 1)):
            yield first, min(self.per_round, self.call.patches - first)

    def patches(self) -> None:
        """Fill the gradients of x and of the generated weights, and the rows of partial sums."""
        call, sizes, sums = self.call, self.call.sizes, self.by_patch.shape[1]
        table = call.table(self.waves)
        later_states = None if sizes.aliased else self.later_states
        scratch = self.states, self.later_states, self.inverse_rms, self.grads, self.by_patch
        groups_before = 0
        for first, now in self.rounds():
            call.forward("states", now, table, self.inverse_lengths, first, grad=self.grad, scratch=scratch, sums=sums)
            if call.depth:
                backward_kernel[(now,)](
                    call.weights, call.gains, self.states, later_states, self.inverse_rms, self.inverse_lengths, self.grad_weights,
                    self.by_patch, self.grads, self.scratch_sums, first, call.depth, sums, **launch_of("backward", sizes),
                )  # fmt: skip
            groups = -(-now // self.per_group)
            enter_kernel[(groups * self.tiles["enter"],)](
                call.x, call.embed, self.grads, self.grad_x, self.by_group, first, call.columns, call.per_image,
                call.embed.shape[1], *call.x.stride(), now, groups_before, self.per_group, **launch_of("enter", sizes),
            )  # fmt: skip
            groups_before += groups

    def shared(self) -> tuple[Tensor, ...]:
        """Return the gradients of the tensors that all patches share: sums over the rows of partial sums in a fixed order."""
        call, sizes = self.call, self.call.sizes
        made = [call.empty(*v.shape, dtype=v.dtype) for v in call.tensors[2:]]
        embed, bias, gains, out_gain, out_weight, out_bias = made
        if not sizes.residual:
            gains, out_gain = gains.zero_(), out_gain.zero_()
        finish_kernel[(sizes.hidden,)](
            self.by_patch.sum(0), self.by_group.sum(0), self.waves, embed, bias, gains, out_gain, out_weight, out_bias,
            call.freqs, call.depth, **launch_of("finish", sizes),
        )  # fmt: skip
        return embed, bias, gains, out_gain, out_weight, out_bias


def neural_field_bwd(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    """Return the same as reference.neural_field_bwd: gradients of the eight tensors, empty where not needed."""
    *inputs, needs = arguments
    call = _Call(*inputs)
    if not takes(call.sizes):
        return reference.neural_field_bwd(grad, *arguments)
    with on_device_of(call.x):
        work = _Backward(call, grad)
        work.patches()
        found = (work.grad_x, work.grad_weights, *work.shared())
    return tuple(f if need else f.new_empty(0) for f, need in zip(found, needs))
