"""The neural field written from its formulas, and random inputs for it."""

import math
import os

import torch

VARIANTS = [("both", "residual"), ("first", "residual"), ("both", "plain"), ("first", "plain")]
#: Height and width of images with 4 x 4 patches. The interpreter takes some 50 ms per patch for forward and backward.
HEIGHT, WIDTH = (8, 4) if os.environ.get("TRITON_INTERPRET") == "1" else (8, 12)


def dtype_for(backend):
    """A dtype of calls that a backend's own kernels take: those in CUDA C++ take 16-bit tensors, and pass all others on."""
    return torch.bfloat16 if backend == "cuda" else torch.float32


def pixnerd_field(x, s_weights, embed_w, embed_b, norms, out_norm, out_w, out_b, p, r, variant=VARIANTS[0], eps=1e-6):
    """PixNerd's decoder written from its formulas (docs/ops/neural_field.md), per patch and per pixel of a patch."""
    normalise, form = variant
    batch, channels, height, width = x.shape
    hidden = embed_b.shape[0]
    freqs_count = math.isqrt(embed_w.shape[1] - channels)
    at = torch.linspace(0, 1, p, dtype=x.dtype)
    freqs = torch.linspace(0, freqs_count, freqs_count, dtype=x.dtype)
    rows = []
    for v in at:
        for u in at:
            wave = torch.cos(math.pi * u * freqs)[:, None] * torch.cos(math.pi * v * freqs)[None, :]
            rows.append((wave / (1 + freqs[:, None] * freqs[None, :])).flatten())
    dct = torch.stack(rows)

    def rms(h, gain):
        return h / torch.sqrt((h * h).mean(-1, keepdim=True) + eps) * gain

    images = []
    for b in range(batch):
        lines = []
        for i in range(height // p):
            line = []
            for j in range(width // p):
                patch = x[b, :, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(channels, -1).T
                h = torch.nn.functional.linear(torch.cat((patch, dct), 1), embed_w, embed_b)
                for block in range(s_weights.shape[2]):
                    first, second = s_weights[b, i * (width // p) + j, block].chunk(2)
                    w1 = torch.nn.functional.normalize(first.view(hidden, r * hidden), dim=-2)
                    w2 = second.view(r * hidden, hidden)
                    if normalise == "both":
                        w2 = torch.nn.functional.normalize(w2, dim=-2)
                    if form == "residual":
                        h = h + torch.nn.functional.silu(rms(h, norms[block]) @ w1) @ w2
                    else:
                        h = torch.nn.functional.silu(h @ w1) @ w2
                if form == "residual":
                    h = rms(h, out_norm)
                line.append((h @ out_w.T + out_b).T.reshape(channels, p, p))
            lines.append(torch.cat(line, 2))
        images.append(torch.cat(lines, 1))
    return torch.stack(images)


def field_inputs(
    channels=3,
    hidden=16,
    depth=2,
    ratio=2,
    p=4,
    freqs=4,
    dtype=torch.float64,
    batch=2,
    height=HEIGHT,
    width=WIDTH,
    form="residual",
):
    """Leaves for neural_field: x, generated weights and shared parameters; the gains are None for form "plain"."""

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()

    patches = (height // p) * (width // p)
    return (
        normal(batch, channels, height, width),
        normal(batch, patches, depth, 2 * ratio * hidden * hidden, scale=0.1),
        normal(hidden, channels + freqs**2, scale=0.3),
        normal(hidden, scale=0.3),
        *((normal(depth, hidden), normal(hidden)) if form == "residual" else (None, None)),
        normal(channels, hidden, scale=0.3),
        normal(channels, scale=0.3),
    )
