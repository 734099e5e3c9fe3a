"""The device of these tests, and Trainers on it."""

import types
from unittest import mock

import pytest
import torch
from accelerate import Accelerator

from flowseg.runs.parallel import Ranks
from flowseg.training.trainer import Trainer
from tests.support import pretend_device


@pytest.fixture(scope="session")
def device():
    return pretend_device.chosen_device()


class _OnDevice(Accelerator):
    """An Accelerator on a device that Accelerate does not know."""

    def __init__(self, device):
        super().__init__(mixed_precision="no", cpu=device.type != "cuda")
        self._own_device = device

    @property
    def device(self):
        return getattr(self, "_own_device", torch.device("cpu"))


class _TorchWithGPU:
    """PyTorch for a module that asks it whether there is a GPU."""

    cuda = types.SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(scope="session")
def trainer_on(tmp_path_factory):
    """A function that makes a Trainer on a device."""

    def make(device, config):
        trainer = Trainer(config, tmp_path_factory.mktemp("run"), _OnDevice(device), Ranks(1))
        trainer.model.train()
        return trainer

    # The loader itself decides to pin: it does so if there is a GPU, which the pretended device is not.
    with mock.patch("flowseg.data.loader.torch", _TorchWithGPU()):
        yield make
