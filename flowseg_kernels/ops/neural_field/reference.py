"""Plain PyTorch for the pixel neural field: the specification, and for now what every device runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import compute_dtype

__all__ = ["cosine_features", "neural_field", "neural_field_bwd"]


def cosine_features(patch_size: int, max_freqs: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(p^2, F^2) features of the pixels of a patch: cos(pi u f_i) cos(pi v f_j) / (1 + f_i f_j).

    u runs along a row of pixels and v down a column, both linspace(0, 1, p); f = linspace(0, F, F) (PixNerd, 2507.23268).
    """
    position = torch.linspace(0, 1, patch_size, dtype=torch.float64, device=device)
    freqs = torch.linspace(0, max_freqs, max_freqs, dtype=torch.float64, device=device)
    waves = torch.cos(math.pi * position[:, None] * freqs)  # (p, F)
    damping = 1 / (1 + freqs[:, None] * freqs)  # (F, F), for f_i along u and f_j along v
    table = waves[None, :, :, None] * waves[:, None, None, :] * damping  # (v, u, i, j)
    return table.reshape(patch_size**2, max_freqs**2).to(dtype)


def _rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps) * weight


def neural_field(
    x: Tensor,
    weights: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    norm_weight: Tensor,
    out_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    patch_size: int,
    mlp_ratio: int,
    eps: float,
) -> Tensor:
    """Velocity (B, C, H, W) in the dtype of x; each stage in fp32 at least. Differentiable by autograd.

    h = Linear([x, DCT]); L times h += silu(RMSNorm(h) @ W1 / |W1|) @ W2 / |W2|; out = Linear(RMSNorm(h)).
    """
    dtype = compute_dtype(x.dtype)
    batch, channels, height, width = x.shape
    hidden, p = embed_bias.shape[0], patch_size
    rows, columns = height // p, width // p
    pixels = x.to(dtype).reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    pixels = pixels.reshape(batch * rows * columns, p * p, channels)
    max_freqs = math.isqrt(embed_weight.shape[1] - channels)
    table = cosine_features(p, max_freqs, dtype=dtype, device=x.device)
    # The DCT features are the same for every patch, so their product with the weights is one constant table.
    embed = embed_weight.to(dtype)
    h = pixels @ embed[:, :channels].T + (table @ embed[:, channels:].T + embed_bias.to(dtype))
    wide = mlp_ratio * hidden
    blocks = weights.reshape(batch * rows * columns, weights.shape[2], 2 * hidden * wide)
    for block in range(blocks.shape[1]):
        generated = blocks[:, block].to(dtype)
        w1 = generated[:, : hidden * wide].reshape(-1, hidden, wide)
        w2 = generated[:, hidden * wide :].reshape(-1, wide, hidden)
        # One scale a column: normalising after the product leaves the normalised weights unstored.
        scale1 = 1 / torch.linalg.vector_norm(w1, dim=1, keepdim=True).clamp_min(1e-12)
        scale2 = 1 / torch.linalg.vector_norm(w2, dim=1, keepdim=True).clamp_min(1e-12)
        inner = torch.nn.functional.silu((_rms_norm(h, norm_weight[block].to(dtype), eps) @ w1) * scale1)
        h = h + (inner @ w2) * scale2
    out = _rms_norm(h, out_norm_weight.to(dtype), eps) @ out_weight.to(dtype).T + out_bias.to(dtype)
    out = out.reshape(batch, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, channels, height, width).to(x.dtype).contiguous()


def neural_field_bwd(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    norm_weight: Tensor,
    out_norm_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    patch_size: int,
    mlp_ratio: int,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors, empty where not needed. Recomputes the forward: nothing but inputs was saved."""
    tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_(need) for v, need in zip(tensors, needs)]
        out = neural_field(*leaves, patch_size, mlp_ratio, eps)
        wanted = [v for v in leaves if v.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad) if wanted else ())
    return tuple(next(found).contiguous() if need else v.new_empty(0) for v, need in zip(tensors, needs))
