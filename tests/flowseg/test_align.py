"""REPA: features match our patches, the projector learns, the encoder does not; and trackers."""

import pytest
import torch

from flowseg.errors import UserError
from flowseg.segment import Segmenter
from flowseg.training.alignment import ImageFeatures, alignment_loss
from flowseg.training.trainer import train

from .support.runs import metrics
from .tiny import tiny_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[repa]'")


def test_features_match_our_patches(encoder_folder):
    encoder = ImageFeatures.from_pretrained(str(encoder_folder))
    assert (encoder.dim, encoder.patch_size, encoder.leading) == (24, 14, 1)
    image = torch.rand(1, 3, 32, 64) * 2 - 1
    features = encoder(image, 2, 4)
    assert features.shape == (1, 8, 24) and not features.requires_grad
    # The same by hand: pixels in [0, 1], normalised like ImageNet, 14 pixels per patch.
    pixels = torch.nn.functional.interpolate(image, size=(28, 56), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((pixels + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = encoder.encoder(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features, expected)
    assert not encoder.train().encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_register_tokens_are_left_out():
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_register_tokens": 4,
        "image_size": 28,
    }
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
    assert ImageFeatures(model)(torch.zeros(1, 3, 32, 32), 2, 2).shape == (1, 4, 8)


def test_loss_is_one_minus_the_cosine():
    a = torch.randn(2, 5, 7, requires_grad=True)
    assert float(alignment_loss(a, 3 * a.detach()).detach()) == pytest.approx(0, abs=1e-6)
    assert float(alignment_loss(a, -a.detach()).detach()) == pytest.approx(2)
    b = torch.randn(2, 5, 7)
    expected = 1 - ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
    torch.testing.assert_close(alignment_loss(a, b), expected)


def test_training_aligns_and_the_result_has_no_projector(encoder_folder, tmp_path):
    config = tiny_config(
        repa={"weight": 0.5, "encoder": str(encoder_folder), "block": 1},
        train={"steps": 30, "eval_every": 100, "trackers": ["tensorboard"]},
        optim={"lr": 3e-3},
    )
    train(config, tmp_path / "run")
    losses = [line["align"] for line in metrics(tmp_path / "run", "train")]
    assert losses[0] > 0.8 and sum(losses[-5:]) / 5 < 0.7 * losses[0]
    assert Segmenter.from_run(tmp_path / "run", config).model.projector is None
    config.train.steps = 31
    assert train(config, tmp_path / "run", resume=True).state.step == 31
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path / "run" / "flowseg")).Reload()
    logged = [event.value for event in read.Scalars("train/align")]
    assert logged[:30] == pytest.approx(losses) and read.Scalars("validation/miou")[0].step == 30


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_step_with_alignment_is_one_graph_per_stage(
    encoder_folder, tmp_path, monkeypatch, compiled_graphs, checkpointing
):
    stages = [] if checkpointing else [{"at": 2, "height": 32, "width": 32, "batch_size": 2}]
    settings = {"train": {"steps": 4, "eval_every": 100, "stages": stages}}
    repa = {"weight": 0.5, "encoder": str(encoder_folder), "block": 1}
    compiled = {"compile": True, "activation_checkpointing": checkpointing}
    # The validation at the end, which compiles another network, has its own test.
    monkeypatch.setattr("flowseg.inference.network.compiled", lambda network: network)
    train(tiny_config(**settings, repa=repa, model=compiled), tmp_path / "compiled")
    # The trainer asks for fullgraph, so a second graph for one size would be an error or another graph here.
    assert len(compiled_graphs) == 1 + len(stages)
    monkeypatch.undo()
    train(tiny_config(**settings, repa=repa), tmp_path / "eager")
    found, wanted = ([line["loss"] for line in metrics(tmp_path / name, "train")] for name in ("compiled", "eager"))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_wrong_encoders_and_blocks_are_errors(tmp_path, encoder_folder):
    with pytest.raises(UserError, match="cannot be loaded"):
        ImageFeatures.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"repa.block must be at most the 2 blocks of the model, got 8"):
        train(tiny_config(repa={"weight": 0.5, "encoder": str(encoder_folder)}), tmp_path / "run")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="wanted a dinov2 model, got 'vit'"):
        ImageFeatures.from_pretrained(str(tmp_path / "vit"))
