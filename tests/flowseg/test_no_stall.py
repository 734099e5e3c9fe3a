"""Training steps, sampling and evaluation never wait for the device; tests/support/pretend_device.py says how this is shown."""

import pytest

from tests.support.pretend_device import run_in_own_process


@pytest.mark.parametrize("device", ["pretend", "cuda"])
def test_nothing_waits_for_the_device(device):
    folder = "tests/flowseg/no_stall"
    run_in_own_process(device, f"{folder}/training.py", f"{folder}/sampling.py")
