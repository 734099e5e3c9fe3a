"""Sharing a network: what is written is read back to the same labels, without a request."""

import json
import socket

import pytest
import torch
import yaml
from PIL import Image

from flowseg.data import open_data
from flowseg.errors import UserError
from flowseg.hub import from_pretrained, is_shared, save_pretrained
from flowseg.segment import Segmenter
from flowseg.training.trainer import train

from .support.commands import run
from .tiny import folder_section, tiny_config


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def trained(folder_data, tmp_path):
    config = tiny_config(data=folder_section(folder_data), train={"steps": 4})
    train(config, tmp_path / "run")
    return Segmenter.from_run(tmp_path / "run", config)


def test_a_folder_gives_the_same_labels(trained, tmp_path):
    folder = save_pretrained(trained, tmp_path / "shared", license="cc-by-nc-4.0")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = from_pretrained(folder)
    image = open_data(trained.config.data).val[0][0]
    assert torch.equal(loaded.labels(image), trained.labels(image))
    assert torch.equal(loaded.codebook.centroids, trained.codebook.centroids)
    # Where the data lay is nobody's business.
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert from_pretrained(folder, ["sample.steps=7"]).config.sample.steps == 7


def test_the_card_says_what_is_known(trained, tmp_path):
    save_pretrained(trained, tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-segmentation" and "license" not in front
    assert "Not measured" in card and "a, b, c" in card and "3 classes" in card
    scores = {"miou": 12.345, "pixel_accuracy": 50.0, "images": 2, "split": "val", "sample": {"steps": 2}}
    save_pretrained(trained, tmp_path / "a", scores=scores, license="mit")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "12.35 % mIoU" in card and yaml.safe_load(card.split("---")[1])["license"] == "mit"


def test_what_is_not_there_or_was_edited_is_named(trained, tmp_path):
    with pytest.raises(UserError, match="no such folder, and cannot be loaded from the Hugging Face hub"):
        from_pretrained("owner/nothing-of-that-name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a folder that flowseg export wrote"):
        from_pretrained(tmp_path / "empty")
    folder = save_pretrained(trained, tmp_path / "shared")
    tree = json.loads((folder / "config.json").read_text())
    tree["flowseg"]["codes"]["sequence"] = "grid"
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="the file was edited"):
        from_pretrained(folder)
    assert is_shared(str(folder)) and is_shared("owner/name") and not is_shared("runs") and not is_shared("../a")


def test_export_and_predict_from_the_command_line(trained, tmp_path, folder_data, monkeypatch, capsys):
    shared = tmp_path / "shared"
    status, out, _ = run(monkeypatch, capsys, "export", "--run", tmp_path / "run", "--out", shared)
    assert status == 0 and "shared" in out
    inputs = folder_data / "images" / "val"
    for name in (shared, tmp_path / "run"):
        assert run(monkeypatch, capsys, "predict", inputs, "--run", name, "--out", tmp_path / f"m-{name.name}")[0] == 0
    masks = [Image.open(tmp_path / f"m-{name}" / "e.mask.png").tobytes() for name in ("shared", "run")]
    assert masks[0] == masks[1]
    status, _, err = run(
        monkeypatch, capsys, "export", "--run", tmp_path / "run", "--out", shared, "--scores", "none.json"
    )
    assert status == 2 and "none.json" in err
