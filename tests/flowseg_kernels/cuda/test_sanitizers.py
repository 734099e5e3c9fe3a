"""The CUDA kernels on the host under ThreadSanitizer and AddressSanitizer, which must also find the faults planted for them.

The loss and the decode run for three channels (by guesses: four), fp32 arithmetic and neg_log only: the other kernels are instances
of the same templates, and the tests of the ops run them without a sanitizer (`pytest -p tests.host_cuda.plugin
tests/flowseg_kernels/ops`).
test_field_forward.py and test_field_backward.py plant faults that need no sanitizer.
"""

import os
import subprocess

import pytest

from ...host_cuda import kernels as host_kernels

OPTIONS = {"TSAN_OPTIONS": "exitcode=66:halt_on_error=1", "ASAN_OPTIONS": "exitcode=66:detect_leaks=0"}
#: Planted faults by the code that contains them: reading pixels and staging codes, reading the lists of the decode grid and
#: counting its results, or staging the projection of guesses and reading their lists. ThreadSanitizer looks for a missing barrier,
#: AddressSanitizer for a read past the end of an array.
FAULTS = {
    "thread": {"pixels": "race", "grid": "histogram", "guesses": "axes"},
    "address": {"pixels": "overrun", "grid": "list", "guesses": "members"},
}
MESSAGES = {"thread": "data race", "address": "heap-buffer-overflow"}


@pytest.fixture(scope="module", params=["thread", "address"])
def driver(request, kernels):
    """(sanitizer, function that runs the driver, with a planted fault if one is given)."""
    sanitizer = request.param
    flags = ["-O1", "-g1", f"-fsanitize={sanitizer}", "-DFLOWSEG_ONLY_FP32_C3", "-DFLOWSEG_PLANTS"]
    program = host_kernels.compiled(f"driver-{sanitizer}", *flags, sources=("driver.cpp", "ops.cpp"))

    def run(*fault):
        # setarch -R turns address randomisation off: ThreadSanitizer of older compilers does not know the layouts of newer systems.
        command = ["setarch", "-R", program, *fault]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPTIONS}, timeout=300)

    return sanitizer, run


def test_every_kernel_is_clean(driver):
    done = driver[1]()
    assert done.returncode == 0 and "every kernel ran" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("place", ["pixels", "grid", "guesses"])
def test_the_planted_fault_is_found(driver, place):
    sanitizer, run = driver
    done = run(FAULTS[sanitizer][place])
    assert done.returncode == 66 and MESSAGES[sanitizer] in done.stderr, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("driver", ["thread"], indirect=True)
def test_weights_that_are_loaded_too_early_are_found(driver):
    done = driver[1]("early_load")
    assert done.returncode == 66 and MESSAGES["thread"] in done.stderr, done.stdout + done.stderr[-3000:]
