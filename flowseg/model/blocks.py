"""Transformer blocks: RMSNorm, attention with 2-D rotary positions, SwiGLU, modulation by the time embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm that casts its gain to the dtype of the input, which keeps the fused kernel under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TimeEmbedding(nn.Module):
    """Embed a time in [0, 1]: sines and cosines of geometric frequencies, then a two-layer MLP.

    Frequencies are ``max_period ** (-i / half)``, ``i = 0 .. half - 1`` (PixNerd: 256 features, max_period 10).
    """

    def __init__(self, dim: int, features: int = 256, max_period: float = 10.0):
        super().__init__()
        half = features // 2
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, dim)``."""
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def rotary_table(rows: int, columns: int, head_dim: int, *, extent: float = 16.0, theta: float = 10000.0) -> Tensor:
    """Rotations of the positions of a ``rows x columns`` patch grid, in row-major order.

    Positions on both axes are ``linspace(0, extent)`` for every grid (PixNerd): all resolutions share the same range of
    angles. Pairs alternate: one rotates with the column, the next with the row.

    Returns:
        ``(2, rows * columns, head_dim / 2)`` float32: cosines and sines.
    """
    quarter = head_dim // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    x = torch.linspace(0.0, extent, columns)
    y = torch.linspace(0.0, extent, rows)
    angle_x = (x[:, None] * frequencies).expand(rows, columns, quarter)
    angle_y = (y[:, None] * frequencies)[:, None].expand(rows, columns, quarter)
    angles = torch.stack([angle_x, angle_y], dim=-1).reshape(rows * columns, 2 * quarter)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs in the last axis of ``x`` ``(B, heads, N, head_dim)`` by the angles of ``table``."""
    cos, sin = table.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are RMS-normalised per head, then rotated."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_norm = RMSNorm(dim // heads, eps=1e-6)
        self.key_norm = RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Map ``(B, N, dim)`` to ``(B, N, dim)``."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.query_norm(q), table), rotate(self.key_norm(k), table)
        if v.device.type == "cpu":
            # On a CPU, attention is slower in bf16 than in float32 (280 tokens, 4 heads: 57 ms against 40 ms).
            q, k, v = q.float(), k.float(), v.float()
        mixed = F.scaled_dot_product_attention(q, k, v).to(x.dtype)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class SwiGLU(nn.Module):
    """``W3 (silu(W1 x) * W2 x)`` with a hidden width of 8/3 ``dim``."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(2 * 4 * dim / 3)
        self.gate_and_value = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Transformer block: attention and SwiGLU, each shifted, scaled and gated by the condition (adaLN with six vectors).

    The projection to the six vectors starts at zero, so a new block is the identity (DiT, arXiv 2212.09748).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.mlp_norm = RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, table: Tensor) -> Tensor:
        """Map ``x`` ``(B, N, dim)`` and the activated ``condition`` ``(B, dim)`` to ``(B, N, dim)``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(torch.addcmul(shift1, self.attention_norm(x), 1 + scale1), table)
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.mlp_norm(x), 1 + scale2))
