"""Fixtures of the tests of the stack."""

import shutil

import pytest
import torch

from .support.folders import write_folder_data
from .tiny import folder_section, tiny_config

torch.set_num_threads(1)


@pytest.fixture
def folder_data(tmp_path):
    """Six 40x24 pairs with classes 0..2 and some 255, under ``images`` and ``labels``."""
    return write_folder_data(tmp_path / "data")


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
