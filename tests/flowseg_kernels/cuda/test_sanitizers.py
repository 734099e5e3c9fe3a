"""CUDA kernels of every op on the CPU under ThreadSanitizer and AddressSanitizer, which must also find what is planted for them.

Those of three channels, fp32 inside and neg_log: other channels, fp64 and the other transforms are other instances of the same
templates, which run in the emulated suite without a sanitizer.
"""

import os
import subprocess

import pytest

from . import emulated

OPTIONS = {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66:detect_leaks=0"}


@pytest.fixture(scope="module", params=["thread", "address"])
def driver(request, kernels):
    """(sanitizer, function that runs the driver with a planted fault or none)."""
    flags = {"thread": "-fsanitize=thread", "address": "-fsanitize=address"}
    flag = flags[request.param]
    program = emulated.ninja(
        request.param, f"-O1 -g1 {flag} -DFLOWSEG_ONLY_3 -DFLOWSEG_PLANTS", emulated.sources("driver"), "driver", flag
    )

    def run(*fault):
        # Without address randomisation: ThreadSanitizer of older compilers does not know the layouts of newer systems.
        command = ["setarch", "-R", program, *fault]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OPTIONS}, timeout=120)

    return request.param, run


def test_every_kernel_is_clean(driver):
    done = driver[1]()
    assert done.returncode == 0 and "every kernel ran" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("place", ["pixels", "grid"])
def test_the_planted_fault_is_found(driver, place):
    """A barrier that is left out, and a read past the end of an array: where pixels are read and codes staged, and where the grid's
    lists are read and its results counted."""
    sanitizer, run = driver
    faults = {"thread": {"pixels": "race", "grid": "histogram"}, "address": {"pixels": "overrun", "grid": "list"}}
    done = run(faults[sanitizer][place])
    words = {"thread": "data race", "address": "heap-buffer-overflow"}[sanitizer]
    assert done.returncode == 66 and words in done.stderr, done.stdout + done.stderr[-3000:]
