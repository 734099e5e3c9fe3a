"""PixNerd's decoder in its own form: unfold, cosine features, cat, Linear, normalise, bmm, SiLU, bmm, fold."""

import math

import torch
import torch.nn.functional as F

from flowseg_kernels.ops.neural_field.reference import cosine_features


def inputs(
    patches: int = 256, depth: int = 4, hidden: int = 64, ratio: int = 2, p: int = 16, channels: int = 3, freqs: int = 8,
    dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu",
):  # fmt: skip
    """Leaves: one image (a grid of patches, as square as possible), its generated weights, and the shared parameters."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = next(n for n in range(math.isqrt(patches), 0, -1) if patches % n == 0)

    def normal(*shape, scale=1.0, shift=0.0):
        return (shift + scale * torch.randn(*shape, generator=generator, device=device)).to(dtype).requires_grad_()

    return (
        normal(1, channels, rows * p, patches // rows * p),
        normal(1, patches, depth, 2 * ratio * hidden * hidden, scale=0.1),
        normal(hidden, channels + freqs**2, scale=0.1),
        normal(hidden, scale=0.1),
        normal(depth, hidden, scale=0.1, shift=1.0),
        normal(hidden, scale=0.1, shift=1.0),
        normal(channels, hidden, scale=0.1),
        normal(channels, scale=0.1),
    )


def products(what: str, device: str) -> int:
    """Matrix products of size (p^2, Hx, r Hx) per patch and block. All bounds of the op use this count.

    Backward repeats the two products of the forward and adds four for the gradients. On a GPU, z = q W1 of all blocks does not fit
    on chip; one more product recomputes it, which is cheaper than memory traffic.
    """
    return {"forward": 2, "backward": 7 if device == "cuda" else 6}[what]


def unfold_by_views(x, p):
    """(B N, C, p^2) pixels of the patches. Compiled F.unfold and F.fold corrupt the heap on two threads (torch 2.13)."""
    batch, channels, height, width = x.shape
    split = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(-1, channels, p * p)


def fold_by_views(pixels, shape, p):
    """The inverse of unfold_by_views."""
    batch, channels, height, width = shape
    split = pixels.reshape(batch, height // p, width // p, channels, p, p).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(shape)


def field(
    x,
    weights,
    embed_weight,
    embed_bias,
    norm_weight,
    out_norm_weight,
    out_weight,
    out_bias,
    dct,
    p=16,
    ratio=2,
    views=False,
):
    """The same values as neural_field. `dct` is features(...), which PixNerd caches between calls."""
    hidden, (batch, patches, depth, _) = embed_bias.shape[0], weights.shape
    if views:
        pixels = unfold_by_views(x, p)
    else:
        pixels = F.unfold(x, kernel_size=p, stride=p).transpose(1, 2).reshape(batch * patches, x.shape[1], p * p)
    h = torch.cat((pixels.transpose(1, 2), dct.expand(batch * patches, -1, -1)), dim=-1)
    h = F.linear(h, embed_weight, embed_bias)
    for block in range(depth):
        first, second = weights[:, :, block].reshape(batch * patches, -1).chunk(2, dim=-1)
        first = F.normalize(first.view(-1, hidden, ratio * hidden), dim=-2)
        second = F.normalize(second.view(-1, ratio * hidden, hidden), dim=-2)
        inner = torch.bmm(F.rms_norm(h, (hidden,), norm_weight[block], 1e-6), first)
        h = h + torch.bmm(F.silu(inner), second)
    out = F.linear(F.rms_norm(h, (hidden,), out_norm_weight, 1e-6), out_weight, out_bias)
    if views:
        return fold_by_views(out.transpose(1, 2), x.shape, p)
    out = out.transpose(1, 2).reshape(batch, patches, -1).transpose(1, 2)
    return F.fold(out, x.shape[2:], kernel_size=p, stride=p)


def features(dtype: torch.dtype = torch.float32, p: int = 16, freqs: int = 8):
    """(1, p^2, F^2) cosine features."""
    return cosine_features(p, freqs, dtype=dtype, device=torch.device("cpu"))[None]


class EagerDecoder(torch.nn.Module):
    """PixNerd's decoder in plain PyTorch, with the parameters of our decoder."""

    def __init__(self, decoder, views=False):
        super().__init__()
        self.decoder, self.views = decoder, views
        self.dct = features()

    def forward(self, x, s):
        own = self.decoder
        weights = torch.stack([block.param_generator1(s) for block in own.blocks], dim=2)
        embed, last = own.x_embedder.embedder[0], own.final_layer
        # Cast the gains to the dtype of the products: with mixed dtypes rms_norm falls back to an unfused path.
        dtype = weights.dtype
        norms = torch.stack([block.norm.weight for block in own.blocks]).to(dtype)
        shared = (embed.weight, embed.bias, norms, last.norm.weight.to(dtype), last.linear.weight, last.linear.bias)
        return field(x, weights, *shared, self.dct.to(x.device, x.dtype), views=self.views)
