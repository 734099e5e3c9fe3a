"""Fixtures of the tests of the stack."""

import shutil

import pytest
import torch

from .support.folders import write_folder_data
from .tiny import folder_section, tiny_config

torch.set_num_threads(1)


@pytest.fixture
def folder_data(tmp_path):
    """A folder with six pairs of 40x24 pixels under ``images`` and ``labels``: classes 0..2, and 255 in the first rows."""
    return write_folder_data(tmp_path / "data")


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs that ``torch.compile`` makes in the test. They run eagerly."""
    from torch._dynamo.testing import EagerAndRecordGraphs

    backend, real = EagerAndRecordGraphs(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: real(model, backend=backend, fullgraph=fullgraph))
    torch._dynamo.reset()
    return backend.graphs


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A small DINOv2 with random weights, saved as the published ones are. Tests must not change it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[repa]'")
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """A run of three steps on its own copy of the folder data. Tests must not change it."""
    from flowseg.training.trainer import train

    place = tmp_path_factory.mktemp("shared")
    config = tiny_config(data=folder_section(write_folder_data(place / "data")), train={"steps": 3})
    train(config, place / "run")
    return place / "run"


@pytest.fixture
def trained_run(shared_run, tmp_path):
    """A copy of the shared run, at ``tmp_path / "run"``."""
    return shutil.copytree(shared_run, tmp_path / "run")
