"""Plain PyTorch for the pixel neural field: the specification, and the fallback for devices and dtypes without a kernel.

The backward is the chain rule written out; docs/ops/neural_field.md derives it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...runtime.checks import compute_dtype

__all__ = [
    "FORMS",
    "NORMALISE",
    "cosine_features",
    "from_patches",
    "generated_layers",
    "neural_field",
    "neural_field_bwd",
    "split_generated",
    "to_patches",
]

#: Values of `normalise`: whether both generated weights of a block have columns of unit length, or only the first.
NORMALISE = ("both", "first")
#: Values of `form`. "residual" (PixNerd): h + W2n silu(W1n RMSNorm(h)). "plain": W2n silu(W1n h), without RMSNorms and gains.
FORMS = ("residual", "plain")


def cosine_features(patch_size: int, max_freqs: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the features (p^2, F^2) of the pixels of a patch: cos(pi u f_i) cos(pi v f_j) / (1 + f_i f_j).

    u runs along a row of pixels and v down a column, both linspace(0, 1, p); f = linspace(0, F, F) (PixNerd, 2507.23268).
    """
    position = torch.linspace(0, 1, patch_size, dtype=torch.float64, device=device)
    freqs = torch.linspace(0, max_freqs, max_freqs, dtype=torch.float64, device=device)
    waves = torch.cos(math.pi * position[:, None] * freqs)  # (p, F)
    damping = 1 / (1 + freqs[:, None] * freqs)  # (F, F), for f_i along u and f_j along v
    table = waves[None, :, :, None] * waves[:, None, None, :] * damping  # (v, u, i, j)
    return table.reshape(patch_size**2, max_freqs**2).to(dtype)


def to_patches(image: Tensor, p: int) -> Tensor:
    """Return the pixels (P, p^2, C) of the P patches of images (B, C, H, W). Patches and pixels are in row-major order."""
    batch, channels, height, width = image.shape
    split = image.reshape(batch, channels, height // p, p, width // p, p)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(-1, p * p, channels)


def from_patches(pixels: Tensor, shape: tuple[int, int, int, int], p: int) -> Tensor:
    """Return images of shape (B, C, H, W) from the pixels (P, p^2, C) of their patches."""
    batch, channels, height, width = shape
    split = pixels.reshape(batch, height // p, width // p, p, p, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def split_generated(flat: Tensor, hidden: int, both: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Split flat (P, 2 r Hx^2) into W1 (P, Hx, r Hx) and W2 (P, r Hx, Hx). Also return the reciprocal norms of their columns.

    The norms scale the products, not the weights. Those of W2 are None without `both`.
    """
    inner = flat.shape[1] // (2 * hidden)
    w1 = flat[:, : hidden * inner].reshape(-1, hidden, inner)
    w2 = flat[:, hidden * inner :].reshape(-1, inner, hidden)
    return w1, w2, _reciprocal_lengths(w1), _reciprocal_lengths(w2) if both else None


def generated_layers(entered: Tensor, w1: Tensor, w2: Tensor, scale1: Tensor, scale2: Tensor | None) -> Tensor:
    """Return silu(entered @ W1 / |W1|) @ W2 / |W2| per patch. entered: (P, p^2, Hx); the rest: as from split_generated."""
    return _scaled(torch.nn.functional.silu((entered @ w1) * scale1) @ w2, scale2)


class _Field:
    """Stages of the field on pixels (P, p^2, C) of P patches, for the forward and for the backward formulas."""

    def __init__(
        self, x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias, p, ratio, eps,
        normalise, form,
    ):  # fmt: skip
        dtype = compute_dtype(x.dtype)
        self.dtype, self.p, self.eps = dtype, p, eps
        self.both, self.residual = normalise == "both", form == "residual"
        self.batch, self.channels, self.height, self.width = x.shape
        self.pixels = self.to_patches(x.to(dtype))
        self.embed = embed_weight.to(dtype)
        max_freqs = math.isqrt(embed_weight.shape[1] - self.channels)
        self.table = cosine_features(p, max_freqs, dtype=dtype, device=x.device)
        self.embed_bias = embed_bias.to(dtype)
        self.hidden = embed_bias.shape[0]
        size = 2 * ratio * self.hidden**2
        self.blocks = weights.reshape(self.pixels.shape[0], weights.shape[2], size)
        # The plain form has no gains: multiply by one.
        self.gains = norm_weight.to(dtype) if self.residual else [1] * weights.shape[2]
        self.out_gain = out_norm_weight.to(dtype) if self.residual else 1
        self.out_weight, self.out_bias = out_weight.to(dtype), out_bias.to(dtype)

    def to_patches(self, image: Tensor) -> Tensor:
        return to_patches(image, self.p)

    def to_image(self, pixels: Tensor) -> Tensor:
        return from_patches(pixels, (self.batch, self.channels, self.height, self.width), self.p)

    def generated(self, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return W1, W2 of a block and the reciprocal norms of their columns, which are applied after the products."""
        return split_generated(self.blocks[:, block].to(self.dtype), self.hidden, self.both)

    def normalise(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return h / rms(h) and 1 / rms(h). In the plain form return h and None."""
        if not self.residual:
            return h, None
        scale = torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.eps)
        return h * scale, scale

    def embedded(self) -> Tensor:
        # All patches have the same cosine features, so their product with the weights is one table.
        constant = self.table @ self.embed[:, self.channels :].T + self.embed_bias
        return self.pixels @ self.embed[:, : self.channels].T + constant

    def step(self, h: Tensor, block: int) -> Tensor:
        out = generated_layers(self.normalise(h)[0] * self.gains[block], *self.generated(block))
        return h + out if self.residual else out


def _reciprocal_lengths(w: Tensor) -> Tensor:
    return 1 / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-12)


def _scaled(v: Tensor, scale: Tensor | None) -> Tensor:
    return v if scale is None else v * scale


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
    normalise: str,
    form: str,
) -> Tensor:
    """Return the velocity (B, C, H, W) in the dtype of x. Every stage computes in fp32 at least.

    h = Linear([x, DCT]); L times h += silu(RMSNorm(h) @ W1 / |W1|) @ W2 / |W2|; out = Linear(RMSNorm(h)).
    With normalise "first", W2 is not normalised. In the form "plain", h = silu(h @ W1 / |W1|) @ W2 / |W2| and out = Linear(h).
    """
    tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
    field = _Field(*tensors, patch_size, mlp_ratio, eps, normalise, form)
    h = field.embedded()
    for block in range(weights.shape[2]):
        h = field.step(h, block)
    out = (field.normalise(h)[0] * field.out_gain) @ field.out_weight.T + field.out_bias
    return field.to_image(out).to(x.dtype).contiguous()


def _norm_backward(grad: Tensor, normal: Tensor, scale: Tensor | None) -> Tensor:
    """Return the gradient of h from the gradient of normal = h * scale, scale = rsqrt(mean(h^2) + eps)."""
    if scale is None:
        return grad
    return scale * (grad - normal * (grad * normal).mean(dim=-1, keepdim=True))


def by_features(by_position: Tensor, features: Tensor) -> Tensor:
    """Return the gradient (Hx, F^2) of the embedding's weights on the cosine features.

    by_position: the gradient of the embedding's result, summed over patches, (p^2, Hx).

    The sum uses fp64: the feature of frequency 0 is 1 everywhere, and its fp32 sum over pixels had up to 2.2 times PyTorch's error.
    """
    return (by_position.T.double() @ features.double()).to(by_position.dtype)


def _column_norm_backward(grad: Tensor, w: Tensor, scale: Tensor | None) -> Tensor:
    """Return the gradient of w from the gradient of its column-normalised w * scale."""
    if scale is None:
        return grad
    unit = w * scale
    return scale * (grad - unit * (grad * unit).sum(dim=1, keepdim=True))


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
    normalise: str,
    form: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of the eight tensors, empty where not needed. Only inputs were saved, so the forward is recomputed."""
    tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
    field = _Field(*tensors, patch_size, mlp_ratio, eps, normalise, form)
    depth = weights.shape[2]
    states = [field.embedded()]
    for block in range(depth):
        states.append(field.step(states[-1], block))

    g = field.to_patches(grad.to(field.dtype))
    normal, scale = field.normalise(states.pop())
    grad_out_bias = g.sum(dim=(0, 1))
    # Sum per patch first: one sum over all pixels had twice the error of PyTorch's own gradient in fp32.
    grad_out_weight = (g.transpose(1, 2) @ (normal * field.out_gain)).sum(dim=0)
    g = g @ field.out_weight
    grad_out_norm = (g * normal).sum(dim=(0, 1)) if field.residual else torch.zeros_like(out_norm_weight)
    g = _norm_backward(g * field.out_gain, normal, scale)

    grad_weights = torch.empty_like(field.blocks)
    grad_norm = torch.zeros_like(norm_weight, dtype=field.dtype)
    for block in reversed(range(depth)):
        w1, w2, scale1, scale2 = field.generated(block)
        normal, scale = field.normalise(states.pop())
        entered = normal * field.gains[block]
        z = (entered @ w1) * scale1
        gate = torch.sigmoid(z)
        into2 = _column_norm_backward((z * gate).transpose(1, 2) @ g, w2, scale2)
        grad_z = (_scaled(g, scale2) @ w2.transpose(1, 2)) * (gate * (1 + z * (1 - gate)))
        into1 = _column_norm_backward(entered.transpose(1, 2) @ grad_z, w1, scale1)
        grad_weights[:, block] = torch.cat((into1.flatten(1), into2.flatten(1)), dim=1).to(grad_weights.dtype)
        back = (grad_z * scale1) @ w1.transpose(1, 2)
        if field.residual:
            grad_norm[block] = (back * normal).sum(dim=(0, 1))
            g = g + _norm_backward(back * field.gains[block], normal, scale)
        else:
            g = back

    by_position = g.sum(dim=0)
    grad_embed = torch.cat(
        ((g.transpose(1, 2) @ field.pixels).sum(dim=0), by_features(by_position, field.table)), dim=1
    )
    found = (
        field.to_image(g @ field.embed[:, : field.channels]),
        grad_weights.reshape(weights.shape),
        grad_embed,
        by_position.sum(dim=0),
        grad_norm,
        grad_out_norm,
        grad_out_weight,
        grad_out_bias,
    )
    return tuple(f.to(v.dtype).contiguous() if need else v.new_empty(0) for f, v, need in zip(found, tensors, needs))
