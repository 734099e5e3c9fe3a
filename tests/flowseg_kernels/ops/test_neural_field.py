import math

import pytest
import torch

import flowseg_kernels as fk

from ..samples import largest_error

VARIANTS = [("both", "residual"), ("first", "residual"), ("both", "plain"), ("first", "plain")]


def pixnerd_field(x, s_weights, embed_w, embed_b, norms, out_norm, out_w, out_b, p, r, variant=VARIANTS[0], eps=1e-6):
    """PixNerd's decoder written from its formulas (method section 5), patch by patch and pixel by pixel of a patch."""
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
    height=8,
    width=12,
    form="residual",
):
    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()

    patches = (height // p) * (width // p)
    return (
        normal(batch, channels, height, width),
        normal(batch, patches, depth, 2 * ratio * hidden * hidden),
        normal(hidden, channels + freqs**2, scale=0.3),
        normal(hidden, scale=0.3),
        *((normal(depth, hidden), normal(hidden)) if form == "residual" else (None, None)),
        normal(channels, hidden, scale=0.3),
        normal(channels, scale=0.3),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels, hidden, depth, ratio, p", [(3, 16, 2, 2, 4), (1, 8, 1, 1, 2), (8, 16, 3, 4, 4)])
def test_equals_pixnerd_in_values_and_every_gradient(channels, hidden, depth, ratio, p, variant):
    inputs = field_inputs(channels, hidden, depth, ratio, p, form=variant[1])
    want = pixnerd_field(*inputs, p, ratio, variant)
    got = fk.neural_field(*inputs, patch_size=p, mlp_ratio=ratio, normalise=variant[0], form=variant[1])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    leaves = [v for v in inputs if v is not None]
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gradcheck_and_only_the_wanted_gradients():
    inputs = field_inputs(2, 4, 1, 1, 2, 2, batch=1, height=2, width=4)
    assert torch.autograd.gradcheck(lambda *v: fk.neural_field(*v, patch_size=2, mlp_ratio=1), inputs)
    frozen = [v.detach() for v in inputs]
    frozen[1] = inputs[1]
    (grad,) = torch.autograd.grad(fk.neural_field(*frozen, patch_size=2, mlp_ratio=1).sum(), inputs[1])
    want = torch.autograd.grad(fk.neural_field(*inputs, patch_size=2, mlp_ratio=1).sum(), inputs[1])[0]
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_plain_pytorch(dtype):
    inputs = [v.detach() for v in field_inputs(dtype=dtype)]
    exact = pixnerd_field(*(v.double() for v in inputs), 4, 2)
    plain = pixnerd_field(*inputs, 4, 2)
    got = fk.neural_field(*inputs, patch_size=4)
    assert got.dtype == dtype
    assert largest_error(got, exact) <= 2 * largest_error(plain, exact)


def test_zero_weights_have_finite_gradients():
    inputs = list(field_inputs())
    inputs[1] = torch.zeros_like(inputs[1]).requires_grad_()
    (grad,) = torch.autograd.grad(fk.neural_field(*inputs, patch_size=4).sum(), inputs[1])
    assert torch.isfinite(grad).all()


def test_decoder_starts_at_zero_and_loads_pixnerd():
    decoder = fk.NeuralFieldDecoder(10, hidden=8, depth=2, patch_size=4, max_freqs=2)
    x, s = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 10)
    assert decoder(x, s).shape == x.shape and not decoder(x, s).any()
    theirs = {}
    for name, value in decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(int(parts[1]) + 22)
        theirs[".".join(parts)] = torch.randn_like(value)
    theirs["blocks.0.attn.qkv.weight"] = torch.zeros(1)
    assert "blocks.22.param_generator1.weight" in theirs and "x_embedder.embedder.0.weight" in theirs
    decoder.load_pixnerd(theirs, first_block=22)
    assert torch.equal(decoder.blocks[1].norm.weight, theirs["blocks.23.norm.weight"]) and decoder(x, s).any()
    with pytest.raises(KeyError, match=r"state_dict: wanted the keys blocks\.20\.param_generator1\.weight"):
        decoder.load_pixnerd(theirs, first_block=20)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a.update(x=torch.randn(2, 3, 9, 12)), "x: wanted height and width divisible by patch_size 4"),
        (lambda a: a.update(weights=torch.randn(2, 5, 2, 1024)), r"weights: wanted shape \(2, 6, L, 1024\)"),
        (lambda a: a.update(embed_weight=torch.randn(16, 20)), "embed_weight: wanted shape"),
        (lambda a: a.update(norm_weight=torch.randn(1, 16)), r"norm_weight: wanted shape \(2, 16\); got \(1, 16\)"),
        (lambda a: a.update(out_bias=torch.randn(4)), r"out_bias: wanted shape \(3,\); got \(4,\)"),
    ],
)
def test_bad_arguments_are_named(change, words):
    names = ("x", "weights", "embed_weight", "embed_bias", "norm_weight", "out_norm_weight", "out_weight", "out_bias")
    arguments = dict(zip(names, field_inputs(dtype=torch.float32)))
    change(arguments)
    with pytest.raises(ValueError, match=words):
        fk.neural_field(**arguments, patch_size=4)
