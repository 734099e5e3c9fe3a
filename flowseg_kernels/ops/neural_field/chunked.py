"""The neural field by chunks of patches: generate the weights of a chunk, apply them, free them; generate them again in backward.

Only one chunk's weights and their gradient are in memory. The price is one more product of the generator.
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
    """Return weights (B, N, L, S) from features s (B, N, D), by one linear map (weight (S, D), bias (S,)) per block."""
    return torch.stack([F.linear(s, weight, bias) for weight, bias in generators], dim=2)


def _chunks(batch: int, rows: int, columns: int, size: int):
    """Yield chunks of at most `size` patches as slices: (images, rows of patches, patches).

    A chunk is whole images if at least one image fits, else whole rows of patches, at least one row.
    """
    images = max(1, size // max(1, rows * columns))
    step = rows if size >= rows * columns else max(1, size // columns)
    for image in range(0, batch, images):
        for row in range(0, rows, max(1, step)):
            end = min(rows, row + step)
            yield slice(image, image + images), slice(row, end), slice(row * columns, end * columns)


class _ChunkedField(torch.autograd.Function):
    """Inputs: size, options of neural_field, backend, x, s, the six shared tensors (None if absent), flat list of generators."""

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
        # Backward runs outside autocast. If forward ran under autocast, backward must cast to the same dtype.
        ctx.dtype = out.dtype if autocast_dtype(x.device.type) else None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dtype = ctx.dtype
        # Non-reentrant checkpointing and hooks on saved tensors allow only one read.
        saved = ctx.saved_tensors
        tensors = [v if v is None or dtype is None or v.dtype == torch.float64 else v.to(dtype) for v in saved]
        x, s, *rest = tensors
        shared, generators = rest[:_SHARED], list(zip(rest[_SHARED::2], rest[_SHARED + 1 :: 2]))
        # The op takes no None.
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
    # torch.compile cannot trace a ContextVar. Like every op's backward, this one's backend is fixed at compile time.
    return requested_backend()


def _has_autocast(device: str) -> bool:
    # torch.compile of torch 2.10 cannot trace this call. Its answer never changes within a process.
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast casts to on this type of device, or None if autocast is off."""
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
    """Return neural_field(x, generate(s, generators), *shared, **options), computed `size` patches at a time.

    It is differentiable once, in every tensor.
    """
    flat = [v for pair in generators for v in pair]
    return _ChunkedField.apply(size, options, _backend_when_compiled(), x, s, *shared, *flat)


def chunked_calls(size: int, x: Tensor, s: Tensor, p: int, decode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return decode(x, s), computed `size` patches of p x p pixels at a time. Backward runs decode again per chunk.

    `decode` may call any modules. Their hooks run again per chunk in backward, with the same random numbers.
    """
    if torch.is_grad_enabled():
        decode = _checkpointed(decode)
    parts: dict[int, list[Tensor]] = {}
    for images, lines, patches in _chunks(x.shape[0], x.shape[2] // p, x.shape[3] // p, size):
        pixels = x[images, :, lines.start * p : lines.stop * p]
        parts.setdefault(images.start, []).append(decode(pixels, s[images, patches]))
    # Without patches there are no chunks.
    return torch.cat([torch.cat(rows, dim=2) for rows in parts.values()]) if parts else decode(x, s)


def _checkpointed(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    backend = "" if torch.compiler.is_compiling() else requested_backend()

    def run(x, s):
        if not backend:
            return decode(x, s)
        # Backward may run outside the use_backend block of forward.
        with use_backend(backend):
            return decode(x, s)

    return lambda x, s: checkpoint(run, x, s, use_reentrant=False)
