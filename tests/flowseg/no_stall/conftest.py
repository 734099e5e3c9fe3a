"""The device of these tests, and Trainers on it."""

from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

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


def _pinning(*arguments, **options):
    return DataLoader(*arguments, **{**options, "pin_memory": True})


@pytest.fixture(scope="session")
def trainer_on(tmp_path_factory):
    """A function that makes a Trainer on a device."""

    def make(device, config):
        trainer = Trainer(config, tmp_path_factory.mktemp("run"), _OnDevice(device), Ranks(1))
        trainer.model.train()
        return trainer

    # The loader pins its batches if there is a GPU. Here it pins them for the pretended device.
    with mock.patch("flowseg.data.loader.DataLoader", _pinning):
        yield make
