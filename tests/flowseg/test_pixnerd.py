"""PixNerd's weights in our network: the same outputs, the published sizes, and a report of tensors that do not fit."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flowseg.config import ModelConfig
from flowseg.errors import UserError
from flowseg.model import FlowSegModel, ModelSize, load_pixnerd
from flowseg.model.sizes import resolve_size

SIZE = ModelSize(patch_size=4, dim=24, heads=2, depth=2, field_depth=2, field_hidden=8)


def pixnerd_weights(size, prefix="", classes=5):
    """Random tensors with the names and shapes of PixNerd's class-conditional model."""
    d, h, p2, r = size.dim, size.field_hidden, size.patch_size**2, 2
    hidden = int(2 * 4 * d / 3)
    shapes = {"s_embedder.proj.weight": (d, 3 * p2), "s_embedder.proj.bias": (d,)}
    shapes |= {"t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,)}
    shapes |= {"t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,)}
    shapes |= {"y_embedder.embedding_table.weight": (classes + 1, d)}
    shapes |= {"x_embedder.embedder.0.weight": (h, 3 + 64), "x_embedder.embedder.0.bias": (h,)}
    for i in range(size.depth):
        block = {"norm1.weight": (d,), "norm2.weight": (d,), "attn.qkv.weight": (3 * d, d)}
        block |= {"attn.q_norm.weight": (d // size.heads,), "attn.k_norm.weight": (d // size.heads,)}
        block |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,), "mlp.w1.weight": (hidden, d)}
        block |= {"mlp.w2.weight": (d, hidden), "mlp.w3.weight": (hidden, d)}
        block |= {"adaLN_modulation.0.weight": (6 * d, d), "adaLN_modulation.0.bias": (6 * d,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    for i in range(size.depth, size.depth + size.field_depth):
        shapes |= {f"blocks.{i}.param_generator1.0.weight": (2 * r * h * h, d), f"blocks.{i}.norm.weight": (h,)}
        shapes |= {f"blocks.{i}.param_generator1.0.bias": (2 * r * h * h,)}
    shapes |= {"final_layer.norm.weight": (h,), "final_layer.linear.weight": (3, h), "final_layer.linear.bias": (3,)}
    return {prefix + name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def rms(x, gain):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


def pixnerd_forward(w, size, x, t):
    """PixNerd as published, without a class, written independently of our code: complex numbers, unfold and fold."""
    p, heads = size.patch_size, size.heads
    batch, _, height, width = x.shape
    rows, columns = height // p, width // p
    patches = F.unfold(x, p, stride=p).transpose(1, 2)
    angles = t[:, None] * torch.exp(-math.log(10) * torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], -1)
    time = F.silu(features @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"])
    time = (time @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"])[:, None]
    s = patches @ w["s_embedder.proj.weight"].T + w["s_embedder.proj.bias"]
    head = size.dim // heads
    frequencies = 10000.0 ** (-torch.arange(0, head, 4) / head)
    y_place, x_place = torch.meshgrid(torch.linspace(0, 16, rows), torch.linspace(0, 16, columns), indexing="ij")
    turns = [torch.outer(place.flatten(), frequencies) for place in (x_place, y_place)]
    turn = torch.polar(torch.ones(()), torch.stack(turns, -1).flatten(1))
    for i in range(size.depth):
        b = {name.removeprefix(f"blocks.{i}."): v for name, v in w.items() if name.startswith(f"blocks.{i}.")}
        m = F.silu(time) @ b["adaLN_modulation.0.weight"].T + b["adaLN_modulation.0.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.split(size.dim, -1)
        u = (rms(s, b["norm1.weight"]) * (1 + scale1) + shift1) @ b["attn.qkv.weight"].T
        q, k, v = (part.view(batch, -1, heads, head) for part in u.split(size.dim, -1))
        turned = []
        for part, gain in ((q, b["attn.q_norm.weight"]), (k, b["attn.k_norm.weight"])):
            pairs = torch.view_as_complex(rms(part, gain).reshape(batch, -1, heads, head // 2, 2))
            turned.append(torch.view_as_real(pairs * turn[:, None]).flatten(-2))
        weights = torch.einsum("bnhd,bmhd->bhnm", *turned).div(math.sqrt(head)).softmax(-1)
        mixed = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
        s = s + gate1 * (mixed @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        u = rms(s, b["norm2.weight"]) * (1 + scale2) + shift2
        s = s + gate2 * ((F.silu(u @ b["mlp.w1.weight"].T) * (u @ b["mlp.w3.weight"].T)) @ b["mlp.w2.weight"].T)
    s = F.silu(time + s).flatten(0, 1)
    place, f = torch.linspace(0, 1, p), torch.linspace(0, 8, 8)
    waves = torch.cos(torch.pi * place[:, None] * f)
    cosines = torch.einsum("yj,xi->yxij", waves, waves) / (1 + torch.outer(f, f))
    pixels = patches.reshape(-1, 3, p * p).transpose(1, 2)
    pixels = torch.cat([pixels, cosines.reshape(1, p * p, 64).expand(len(pixels), -1, -1)], -1)
    hidden = pixels @ w["x_embedder.embedder.0.weight"].T + w["x_embedder.embedder.0.bias"]
    for i in range(size.depth, size.depth + size.field_depth):
        generated = s @ w[f"blocks.{i}.param_generator1.0.weight"].T + w[f"blocks.{i}.param_generator1.0.bias"]
        first, second = generated.chunk(2, -1)
        first = F.normalize(first.view(len(s), size.field_hidden, -1), dim=-2)
        second = F.normalize(second.view(len(s), -1, size.field_hidden), dim=-2)
        hidden = hidden + F.silu(rms(hidden, w[f"blocks.{i}.norm.weight"]) @ first) @ second
    out = rms(hidden, w["final_layer.norm.weight"]) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
    return F.fold(out.transpose(1, 2).reshape(batch, rows * columns, -1).transpose(1, 2), (height, width), p, stride=p)


@pytest.mark.parametrize("prefix", ["", "ema_denoiser."])
def test_the_network_computes_what_pixnerd_computes(prefix, tmp_path):
    weights = pixnerd_weights(SIZE, prefix)
    model = FlowSegModel(SIZE, condition_on_image=False)
    if prefix:
        # Lightning saves both copies of the weights under one key.
        torch.save({"state_dict": weights | pixnerd_weights(SIZE, "denoiser.")}, tmp_path / "p.ckpt")
        report = load_pixnerd(model, tmp_path / "p.ckpt")
    else:
        save_file(weights, tmp_path / "p.safetensors")
        report = load_pixnerd(model, tmp_path / "p.safetensors")
    assert len(report.loaded) == len(model.state_dict()) and not report.widened and "loaded" in str(report)
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([0.1, 0.8])
    expected = pixnerd_forward({name.removeprefix(prefix): v for name, v in weights.items()}, SIZE, x, t)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_the_image_and_of_added_channels_start_at_zero():
    weights = pixnerd_weights(SIZE)
    x, t, image = torch.randn(1, 3, 8, 8), torch.tensor([0.4]), torch.randn(1, 3, 8, 8)
    model = FlowSegModel(SIZE)
    report = load_pixnerd(model, weights)
    assert report.widened == ["patch_embed.proj.weight"]
    torch.testing.assert_close(model(x, t, image), pixnerd_forward(weights, SIZE, x, t), rtol=1e-4, atol=1e-5)
    wide = FlowSegModel(SIZE, channels=8)
    report = load_pixnerd(wide, weights)
    assert len(report.widened) == 2 and len(report.mismatched) == 2 and "(3, 8) for (8, 8)" in report.mismatched[0]
    assert torch.equal(wide.patch_embed.proj.weight[:, :48], weights["s_embedder.proj.weight"])
    assert not wide.patch_embed.proj.weight[:, 48:].any()
    assert torch.equal(
        wide.decoder.x_embedder.embedder[0].weight[:, 8:], weights["x_embedder.embedder.0.weight"][:, 3:]
    )


def test_an_error_names_tensors_that_do_not_fit(tmp_path):
    weights = pixnerd_weights(SIZE)
    weights["blocks.9.strange.weight"] = torch.zeros(1)
    del weights["blocks.1.attn.k_norm.weight"]
    model = FlowSegModel(SIZE)
    before = model.patch_embed.proj.weight.clone()
    with pytest.raises(
        UserError, match=r"1 missing: blocks.1.attention.key_norm.weight; 1 unexpected: blocks.9.strange"
    ):
        load_pixnerd(model, weights)
    assert torch.equal(before, model.patch_embed.proj.weight)
    report = load_pixnerd(model, weights, strict=False)
    assert report.missing == ["blocks.1.attention.key_norm.weight"] and report.unexpected == ["blocks.9.strange.weight"]
    with pytest.raises(UserError, match=r"30 mismatched: patch_embed.proj.weight \(24, 48\) for \(32, 96\)"):
        wider = ModelSize(patch_size=4, dim=32, heads=2, depth=2, field_depth=2, field_hidden=8)
        load_pixnerd(FlowSegModel(wider), pixnerd_weights(SIZE))
    (tmp_path / "x.ckpt").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x.ckpt: cannot be read as a checkpoint"):
        load_pixnerd(model, tmp_path / "x.ckpt")


def test_a_projector_keeps_its_weights_and_the_check_stays_strict(tmp_path):
    weights = pixnerd_weights(SIZE)
    model = FlowSegModel(SIZE, align_dim=12)
    before = {name: value.clone() for name, value in model.projector.state_dict().items()}
    assert not load_pixnerd(model, weights).missing
    assert before and all(torch.equal(before[name], value) for name, value in model.projector.state_dict().items())
    wider = ModelSize(patch_size=4, dim=32, heads=2, depth=2, field_depth=2, field_hidden=8)
    with pytest.raises(UserError, match="30 mismatched"):
        load_pixnerd(FlowSegModel(wider, align_dim=12), weights)


@pytest.mark.parametrize(("size", "published"), [("L/16", 452.1), ("XL/16", 700.6)])
def test_parameter_counts_equal_pixnerds_without_its_class_table(size, published):
    size = resolve_size(ModelConfig(size=size))
    with torch.device("meta"):
        theirs = pixnerd_weights(size, classes=1000)
        plain, ours = FlowSegModel(size, condition_on_image=False), FlowSegModel(size, channels=8)
    count = sum(value.numel() for value in theirs.values())
    assert round(count / 1e6, 1) == published
    table = theirs["y_embedder.embedding_table.weight"].numel()
    assert table == 1001 * size.dim
    assert sum(p.numel() for p in plain.parameters()) == count - table
    # Five more code channels and the image: inputs of the patch embedding, inputs and outputs of the field.
    added = (5 + 3) * size.patch_size**2 * size.dim + 5 * size.field_hidden + 5 * (size.field_hidden + 1)
    assert sum(p.numel() for p in ours.parameters()) == count - table + added
    assert load_pixnerd(plain, theirs).missing == []
