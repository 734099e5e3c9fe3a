"""FLOPs of networks and of whole runs equal formulas that are written out here; the page of estimates is up to date."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import how_long
from bench.field_plain import products
from flowseg.config import config_from_tree
from flowseg.errors import UserError
from flowseg.model import Flops, build_model, count_flops
from flowseg.model.flops import _count
from flowseg.model.sizes import resolve_size
from flowseg.training.work import alignment_flops, amount, duration, work_of

from ..native import ROOT
from .support.commands import run
from .tiny import tiny_config

FEATURES, TIMES, RATIO = 64, 256, 2


def model_config(channels=3, data=(64, 96), **model):
    codes = {"channels": channels, "sequence": "sqrt_primes" if channels == 3 else "searched"}
    return config_from_tree({"model": model, "codes": codes, "data": {"height": data[0], "width": data[1]}})


def stem_products(size, inputs, height, width):
    """(multiply-adds of all convolutions of the stem, those of the first)."""
    total, first, channels = 0, None, inputs
    width_now = size.stem_width
    for level in range(1, size.patch_size.bit_length()):
        layer = (height >> level) * (width >> level) * 9 * channels * width_now
        first = layer if first is None else first
        total += layer
        channels, width_now = width_now, min(2 * width_now, size.dim)
    patches = (height // size.patch_size) * (width // size.patch_size)
    return total + patches * (channels * size.dim + size.stem_depth * 9 * size.dim**2), first


def expected(config):
    """FLOPs of a forward and of a backward, from the parameters that each token meets, attention, and the field."""
    size, height, width = resolve_size(config.model), config.data.height, config.data.width
    channels = config.codes.channels
    inputs = channels + 3 * config.model.condition_on_image
    patches, pixels, dim = height * width // size.patch_size**2, height * width, size.dim
    if size.stem_width:
        entry, first = stem_products(size, inputs, height, width)
    else:
        entry = first = patches * inputs * size.patch_size**2 * dim
    block = patches * (4 * dim**2 + 3 * dim * int(8 * dim / 3)) + 6 * dim**2 + 2 * patches**2 * dim
    hidden = size.field_hidden
    generated = 2 * RATIO * hidden**2
    product = pixels * RATIO * hidden**2
    into_field, table = pixels * channels * hidden, size.patch_size**2 * FEATURES * hidden
    field = products("forward", "cpu") * size.field_depth * product + 2 * into_field + table
    time = TIMES * dim + dim**2
    forward = entry + time + size.depth * block + size.field_depth * patches * dim * generated + field
    # Each product has two in the backward. The inputs of the network need no gradient.
    backward = 2 * forward - first - TIMES * dim - into_field - table
    # A backward on a CPU computes the field's two products again, which are no model FLOPs.
    again = (products("backward", "cpu") - 2 * products("forward", "cpu")) * size.field_depth * product
    assert again == products("forward", "cpu") * size.field_depth * product
    return 2 * forward, 2 * backward


@pytest.mark.parametrize(
    "config",
    [
        model_config(size="S"),
        model_config(size="L", data=(256, 256)),
        model_config(size="XL", depth=2, data=(512, 512)),
        model_config(size="nano", channels=8),
        model_config(size="nano", stem_width=0, condition_on_image=False),
    ],
    ids=["S", "L", "XL, two blocks", "stem, eight channels", "no image"],
)
def test_flops_are_those_of_the_formula(config):
    counted = count_flops(config)
    assert (counted.forward, counted.backward) == expected(config)
    assert counted.recomputed == 0 and counted.training == counted.forward + counted.backward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flops_are_counted_where_gradients_are_off(mode):
    config = model_config(size="nano", data=(32, 32))
    _count.cache_clear()
    with mode():
        counted = count_flops(config)
    assert (counted.forward, counted.backward) == expected(config)


def test_recomputation_is_counted_apart():
    plain = count_flops(model_config(size="S", depth=3))
    size = resolve_size(model_config(size="S").model)
    checkpointed = count_flops(model_config(size="S", depth=3, activation_checkpointing=True))
    block = expected(model_config(size="S", depth=2))[0] - expected(model_config(size="S", depth=1))[0]
    assert checkpointed == Flops(plain.forward, plain.backward, 3 * block)
    # A chunk of eight patches is a row of six, so the cosine features are multiplied for four chunks, forward and backward.
    generators = 2 * 24 * size.dim * size.field_depth * 2 * RATIO * size.field_hidden**2
    tables = 2 * 3 * 2 * size.patch_size**2 * FEATURES * size.field_hidden
    chunked = count_flops(model_config(size="S", depth=3, field_chunk=8))
    assert chunked == Flops(plain.forward, plain.backward, generators + tables)


def test_another_size_than_that_of_the_settings():
    config = model_config(size="nano", data=(64, 96))
    assert count_flops(config, 32, 48) == count_flops(model_config(size="nano", data=(32, 48))) != count_flops(config)
    with pytest.raises(UserError, match="width must be a multiple of the patch size 16, got 40"):
        count_flops(config, 32, 40)


def test_a_counted_step_of_a_real_network_agrees():
    """The counter's hooks make the decoder multiply the cosine features for every patch; attention is plain here."""
    config = tiny_config()
    size, model = resolve_size(config.model), build_model(config)
    image = torch.zeros(1, 3, 16, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image, torch.zeros(1), image).sum().backward()
    patches, table = 4, 2 * size.patch_size**2 * FEATURES * size.field_hidden
    # Forward, and the gradient of the embedding's weights.
    assert counter.get_total_flops() == count_flops(config).training + 2 * (patches - 1) * table


def test_the_work_of_a_run_is_the_sum_of_its_stages():
    stages = [{"at": 10, "height": 32, "width": 16, "batch_size": 2}, {"at": 50, "height": 8, "width": 8}]
    config = tiny_config(train={"batch_size": 4, "accumulation": 3, "steps": 30, "stages": stages})
    first, second = work_of(config, processes=2)
    assert (first.first, first.last, first.images) == (0, 10, 10 * 4 * 3 * 2)
    assert (second.first, second.last, second.images) == (10, 30, 20 * 2 * 3 * 2)
    assert (second.height, second.width) == (32, 16)
    assert second.flops == count_flops(config, 32, 16) and second.alignment == 0
    assert second.total == second.images * second.flops.training
    with pytest.raises(UserError, match=r"data\.height must be a multiple of the patch size 8, got 17"):
        work_of(tiny_config(data={"height": 17}))


def test_repa_is_counted_apart_and_as_transformers_runs_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[repa]'")
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 3, "patch_size": 14}
    encoder = transformers.Dinov2Config(**shape, image_size=56)
    with torch.device("meta"):
        network = transformers.Dinov2Model(encoder)
    # 4 x 4 patches of 8 x 8 pixels of ours are 4 x 4 patches of 14 x 14.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 56, 56, device="meta"))
    projector = 2 * 16 * (32 * 32 + 32 * 32 + 32 * 48)
    (tmp_path / "config.json").write_text(json.dumps(encoder.to_dict()))
    repa = {"weight": 0.5, "encoder": str(tmp_path)}
    config = tiny_config(data={"height": 32, "width": 32}, repa=repa)
    assert alignment_flops(config) == counter.get_total_flops() + 3 * projector
    (stage,) = work_of(config)
    assert stage.flops == count_flops(config)
    assert stage.per_image == stage.flops.training + alignment_flops(config)
    for name in ("facebook/dinov2-base", "facebook/dinov2-with-registers-large"):
        assert alignment_flops(tiny_config(repa={"weight": 0.5, "encoder": name})) > 0
    assert alignment_flops(tiny_config(repa={"weight": 0.5, "encoder": "someone/else"})) is None


def test_the_public_dinov2_has_the_parameters_that_are_counted():
    """The products of the blocks are twice the parameters of their matrices if there are one patch and one other token."""
    config = tiny_config(data={"height": 8, "width": 8}, repa={"weight": 0.5, "encoder": "facebook/dinov2-base"})
    dim, depth = 768, 12
    blocks = 2 * (2 * 12 * dim**2 * depth + 2 * 2**2 * dim * depth)
    projector = 2 * (32 * 32 + 32 * 32 + 32 * dim)
    assert alignment_flops(config) == 2 * 3 * 14**2 * dim + blocks + 3 * projector


def test_amounts_have_three_digits():
    shown = {
        0: "0.00 FLOP",
        999: "999 FLOP",
        999.6: "1.00 kFLOP",
        12345: "12.3 kFLOP",
        2.2500e12: "2.25 TFLOP",
        5e21: "5,000 EFLOP",
    }
    assert {value: amount(value) for value in shown} == shown


def test_the_command_prints_the_work_and_the_hours(monkeypatch, capsys):
    settings = ["--steps", 1000, "--batch-size", 4, "--set", "model.stem_width=0"]
    status, out, _ = run(monkeypatch, capsys, "flops", "--processes", 4, "--tflops", "0.0001", *settings)
    assert status == 0
    config = config_from_tree({"model": {"stem_width": 0}, "train": {"steps": 1000, "batch_size": 4}})
    (stage,) = work_of(config, 4)
    assert stage.images == 16_000
    hours = stage.images * stage.flops.training / 1e8 / 3600
    for cell in (f"{stage.images:,}", amount(stage.flops.forward), amount(stage.total), f"{hours:,.1f} hours"):
        assert cell in out
    assert f"{hours:,.1f} hours of one GPU at 0.0001 model TFLOP/s, {hours / 4:,.1f} hours on 4 GPUs" in out
    assert "model FLOPs" not in out and "REPA" not in out and "recomputed" not in out
    settings += [
        "--set",
        "repa.weight=0.5",
        "--set",
        "repa.encoder=nowhere",
        "--set",
        "model.activation_checkpointing=true",
    ]
    status, out, _ = run(monkeypatch, capsys, "flops", *settings)
    assert status == 0 and "not counted" in out and "'nowhere'" in out and "recomputed" in out and "hours" not in out


def test_the_hours_are_model_flops_by_the_rate_of_the_log(monkeypatch, capsys):
    repa = {"weight": 0.5, "encoder": "facebook/dinov2-base"}
    pairs = ["--set", "repa.weight=0.5", "--set", f"repa.encoder={repa['encoder']}"]
    pairs += ["--set", "model.activation_checkpointing=true"]
    status, out, _ = run(monkeypatch, capsys, "flops", "--tflops", 2, *pairs)
    (stage,) = work_of(config_from_tree({"repa": repa, "model": {"activation_checkpointing": True}}))
    training = stage.images * stage.flops.training
    assert stage.model_flops == training < 0.9 * stage.total
    assert status == 0 and out.count(amount(training)) == 2
    shown = (
        f"in all {amount(stage.total)}, {amount(training)} of them model FLOPs: {duration(training / 2e12)} of one GPU"
    )
    assert shown in out


@pytest.mark.parametrize("rate", ["0", "-3", "inf", "nan", "1e-320"])
def test_a_rate_that_no_gpu_has_is_refused(monkeypatch, capsys, rate):
    status, out, err = run(monkeypatch, capsys, "flops", "--tflops", rate)
    assert (status, out) == (2, "") and f"--tflops must be from 1e-6 to 1e6, got {float(rate):g}" in err


def test_short_times_are_minutes_or_seconds():
    shown = {
        0.30517: "0.305 seconds",
        59.9: "59.9 seconds",
        90: "1.5 minutes",
        3600: "1.0 hours",
        3.6e7: "10,000.0 hours",
    }
    assert {seconds: duration(seconds) for seconds in shown} == shown


def test_the_page_has_the_tables_of_the_command():
    page = (ROOT / "docs" / "guides" / "how_long.md").read_text()
    for table in how_long.tables():
        assert table in page
    step = how_long.measured()
    assert (step.network, step.side, step.batch) == ("L/16", 512, 16)
    # The rate from its definition: images per second times the FLOPs of an image.
    flops = sum(expected(model_config(size="L", data=(512, 512))))
    assert how_long.rate_tflops() == pytest.approx(16 / (step.ms / 1000) * flops / 1e12)
    used = re.search(r"--tflops (\d+)", page)[1]
    assert round(how_long.rate_tflops(), -1) == float(used)
