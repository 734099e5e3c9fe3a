"""The programs of a build: the C++ compiler, ninja and nvcc."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Unbuildable(Exception):
    """Kernels cannot be compiled; the message is one sentence that says what is missing."""


def require_linux() -> None:
    """Raise Unbuildable on every other system."""
    if os.name != "posix" or sys.platform == "darwin":
        raise Unbuildable(f"kernels are compiled on Linux only, this is {sys.platform}")


def find_compiler() -> str:
    """Return CXX if it is set, else g++, clang++ or c++. CXX may include a launcher and options."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name.split()[0]):
            return name
    raise Unbuildable("no C++ compiler was found (g++ or clang++; or set CXX)")


def find_ninja() -> str:
    """The ninja of PATH, of this environment, or of the installed package `ninja`."""
    local = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(local) if local.exists() else None)
    if not found and importlib.util.find_spec("ninja"):
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    if not found:
        raise Unbuildable("ninja was not found (pip install ninja)")
    return found


def find_nvcc() -> str:
    """The nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of /usr/local/cuda."""
    for folder in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if (Path(folder) / "bin" / "nvcc").exists():
            return str(Path(folder) / "bin" / "nvcc")
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Unbuildable("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    return found


def output(*command: str) -> str:
    """The stripped output of a command; "" if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
