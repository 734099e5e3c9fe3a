"""The CPU kernels on another architecture: cross-compiled for AArch64, whose baseline has NEON, and run in an emulator.

The tests need a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user), and are skipped without them.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = "-std=c++20 -O2 -ftree-vectorize -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Wno-psabi".split()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(sources, output, *options): compiles for AArch64, and returns the path of the output."""
    if not shutil.which(COMPILER):
        pytest.skip(f"{COMPILER} is not installed")
    folder = tmp_path_factory.mktemp("neon")

    def compile_all(sources, output, *options):
        command = [COMPILER, *FLAGS, f"-I{ROOT / 'csrc'}", *options, *map(str, sources), "-o", str(folder / output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / output

    return compile_all


@pytest.fixture(scope="module")
def kernels(build):
    return build([ROOT / "csrc" / "cpu" / "pixel" / "all.cpp"], "kernels.o", "-c")


def test_the_loops_over_pixels_are_neon(kernels):
    dump = [COMPILER.replace("g++", "objdump"), "-d", kernels]
    code = subprocess.run(dump, capture_output=True, text=True).stdout
    for instruction in ("fmla", "fdiv", "fcmgt"):
        assert re.search(rf"{instruction}\s+v\d+\.4s", code), instruction


def test_correction_and_decoding_are_right_there(build, kernels):
    if not shutil.which(EMULATOR):
        pytest.skip(f"{EMULATOR} is not installed")
    driver = ROOT / "tests" / "flowseg_kernels" / "static" / "neon_driver.cpp"
    program = build([driver, kernels], "driver", "-static")
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=60)
    found = re.fullmatch(r"relative error (\S+), wrong pixels (\d+) of 1369\n", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 2e-6 and found[2] == "0"
