"""No op reads from a GPU after its first call with a codebook; tests/support/pretend_device.py says how this is shown."""

import pytest

from tests.support.pretend_device import run_in_own_process


@pytest.mark.parametrize("device", ["pretend", "cuda"])
def test_no_op_waits_for_the_device(device):
    run_in_own_process(device, "tests/flowseg_kernels/compose/read_backs.py")
