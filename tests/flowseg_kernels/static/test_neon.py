"""The CPU kernels for another architecture: the same sources cross-compiled for AArch64, whose baseline has NEON, and run emulated.

Needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user); each missing one skips what it is needed for.
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
    """build(sources, output, *options): compiles for AArch64."""
    if not shutil.which(COMPILER):
        pytest.skip(f"{COMPILER} is not installed")
    folder = tmp_path_factory.mktemp("neon")

    def compile_all(sources, output, *options):
        command = [
            COMPILER,
            *FLAGS,
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'csrc' / 'include'}",
            *options,
            *map(str, sources),
        ]
        done = subprocess.run([*command, "-o", str(folder / output)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / output

    return compile_all


@pytest.fixture(scope="module")
def chunk(build):
    return build([ROOT / "csrc" / "cpu" / "chunk" / "kernels.cpp"], "chunk.o", "-c")


def test_the_loops_over_pixels_are_neon(chunk):
    code = subprocess.run([COMPILER.replace("g++", "objdump"), "-d", chunk], capture_output=True, text=True).stdout
    for instruction in ("fmla", "fdiv", "fcmgt"):
        assert re.search(rf"{instruction}\s+v\d+\.4s", code), instruction


def test_correction_and_decoding_are_right_there(build, chunk):
    if not shutil.which(EMULATOR):
        pytest.skip(f"{EMULATOR} is not installed")
    program = build([ROOT / "tests" / "flowseg_kernels" / "static" / "neon_driver.cpp", chunk], "driver", "-static")
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=60)
    found = re.fullmatch(r"relative error (\S+), wrong pixels (\d+) of 1369\n", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 2e-6 and found[2] == "0"
