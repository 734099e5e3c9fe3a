"""The neural field in chunks of patches: generate the weights of a chunk, apply them, drop them, generate them again in backward.

Memory holds the generated weights and their gradient for one chunk only. The price is one more product of the generator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...runtime.backend import requested_backend, use_backend
from .checks import checked_arguments

__all__ = ["autocast_dtype", "chunked_calls", "chunked_field", "generate"]

_SHARED = 6  # embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias


def generate(s: Tensor, generators: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Weights (B, N, L, S) from features s (B, N, D); `generators` are the weight (S, D) and bias (S,) of each of L blocks."""
    return torch.stack([F.linear(s, weight, bias) for weight, bias in generators], dim=2)


def _chunks(batch: int, rows: int, columns: int, size: int):
    """Yield chunks as slices (images, rows of patches, patches). A chunk is whole images if `size` allows, else whole rows."""
    images = max(1, size // max(1, rows * columns))
    step = rows if size >= rows * columns else max(1, size // columns)
    for image in range(0, batch, images):
        for row in range(0, rows, max(1, step)):
            end = min(rows, row + step)
            yield slice(image, image + images), slice(row, end), slice(row * columns, end * columns)


class _ChunkedField(torch.autograd.Function):
    """Arguments: size, options of neural_field, backend, x, s, six shared tensors or None, and the generators as a flat list."""

    @staticmethod
    def forward(ctx, size, options, backend, x, s, *rest):
        shared, generators = rest[:_SHARED], list(zip(rest[_SHARED::2], rest[_SHARED + 1 :: 2]))
        p = options["patch_size"]
        rows, columns = x.shape[2] // p, x.shape[3] // p
        parts = []
        for images, lines, patches in _chunks(x.shape[0], rows, columns, size):
            weights = generate(s[images, patches], generators)
            pixels = x[images, :, lines.start * p : lines.stop * p]
            arguments = checked_arguments(pixels, weights, *shared, **options)
            parts.append((images, lines, torch.ops.flowseg.neural_field.default(*arguments)))
        out = torch.empty(x.shape, dtype=parts[0][2].dtype if parts else x.dtype, device=x.device)
        for images, lines, part in parts:
            out[images, :, lines.start * p : lines.stop * p] = part
        ctx.save_for_backward(x, s, *rest)
        ctx.size, ctx.options, ctx.backend = size, options, backend
        # Backward runs outside of autocast, but must use the dtype that forward had under autocast.
        ctx.dtype = out.dtype if autocast_dtype(x.device.type) else None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dtype = ctx.dtype
        # Read once: non-reentrant checkpointing and hooks on saved tensors allow only one read.
        saved = ctx.saved_tensors
        tensors = [v if v is None or dtype is None or v.dtype == torch.float64 else v.to(dtype) for v in saved]
        x, s, *rest = tensors
        shared, generators = rest[:_SHARED], list(zip(rest[_SHARED::2], rest[_SHARED + 1 :: 2]))
        # The op takes tensors only.
        field = [x.new_empty(0) if v is None else v for v in shared]
        needs = list(ctx.needs_input_grad[3:])
        need_weights = needs[1] or any(needs[2 + _SHARED :])
        grads = [None if not need else torch.zeros(v.shape, dtype=_sum_dtype(v), device=v.device)
                 for v, need in zip(tensors, needs)]  # fmt: skip
        p, eps = ctx.options["patch_size"], ctx.options["eps"]
        options = (p, ctx.options["mlp_ratio"], eps, ctx.options["normalise"], ctx.options["form"])
        op_needs = [needs[0], need_weights, *needs[2 : 2 + _SHARED]]
        for images, lines, patches in _chunks(x.shape[0], x.shape[2] // p, x.shape[3] // p, ctx.size):
            features = s[images, patches]
            pixels = slice(lines.start * p, lines.stop * p)
            found = torch.ops.flowseg.neural_field_bwd(
                grad[images, :, pixels].to(x.dtype), x[images, :, pixels], generate(features, generators), *field, *options,
                op_needs, ctx.backend,
            )  # fmt: skip
            if needs[0]:
                grads[0][images, :, pixels] = found[0]
            for place in range(2, 2 + _SHARED):
                if needs[place]:
                    grads[place] += found[place]
            for block, (weight, _) in enumerate(generators):
                if not need_weights:
                    break
                of_block = found[1][:, :, block]
                if needs[1]:
                    grads[1][images, patches] += of_block @ weight
                place = 2 + _SHARED + 2 * block
                if needs[place]:
                    grads[place] += of_block.flatten(0, 1).T @ features.flatten(0, 1)
                if needs[place + 1]:
                    grads[place + 1] += of_block.sum(dim=(0, 1))
        return (None, None, None, *(g if g is None else g.to(v.dtype) for g, v in zip(grads, saved)))


def _sum_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _backend_when_compiled() -> str:
    # torch.compile cannot trace a ContextVar. So the backend is read at compile time, as for the backward of every op.
    return requested_backend()


def _has_autocast(device: str) -> bool:
    # torch.compile of torch 2.10 cannot trace this call. Its result never changes in a process.
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on this type of device, or None if autocast is off."""
    enabled = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


# Same effect as torch.compiler.assume_constant_result, which would import the compiler: slower than all our other imports together.
_backend_when_compiled._dynamo_marked_constant = _has_autocast._dynamo_marked_constant = True


def chunked_field(
    size: int,
    x: Tensor,
    s: Tensor,
    shared: tuple[Tensor | None, ...],
    generators: list[tuple[Tensor, Tensor]],
    options: dict,
) -> Tensor:
    """neural_field(x, generate(s, generators), *shared, **options), computed for `size` patches at a time.

    Differentiable once in every tensor.
    """
    flat = [v for pair in generators for v in pair]
    return _ChunkedField.apply(size, options, _backend_when_compiled(), x, s, *shared, *flat)


def chunked_calls(size: int, x: Tensor, s: Tensor, p: int, decode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """decode(x, s), computed for `size` patches of p x p pixels at a time. Backward runs decode again per chunk.

    `decode` may call any modules. In backward their hooks run again per chunk, with the same random numbers.
    """
    if torch.is_grad_enabled():
        decode = _checkpointed(decode)
    parts: dict[int, list[Tensor]] = {}
    for images, lines, patches in _chunks(x.shape[0], x.shape[2] // p, x.shape[3] // p, size):
        pixels = x[images, :, lines.start * p : lines.stop * p]
        parts.setdefault(images.start, []).append(decode(pixels, s[images, patches]))
    # An empty batch has no chunks.
    return torch.cat([torch.cat(rows, dim=2) for rows in parts.values()]) if parts else decode(x, s)


def _checkpointed(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    backend = "" if torch.compiler.is_compiling() else requested_backend()

    def run(x, s):
        if not backend:
            return decode(x, s)
        # Backward may run outside of the use_backend block of the forward.
        with use_backend(backend):
            return decode(x, s)

    return lambda x, s: checkpoint(run, x, s, use_reentrant=False)
