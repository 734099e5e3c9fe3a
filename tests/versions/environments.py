"""Environments of one Python and one torch under build/versions/, each with this project compiled and installed from a copy."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

from ..mutation.__main__ import copy_tree
from ..native import ROOT
from ..sources import is_known

FOLDER = ROOT / "build" / "versions"
#: Tested sources: a commit that changes none of these needs no new run.
SOURCES = ("csrc", "flowseg_kernels", "build_backend", "setup.py", "pyproject.toml", "tests/conftest.py")
SOURCES += ("tests/native.py", "tests/quick_interpreter.py", "tests/gpu_arithmetic.py", "tests/flowseg_kernels")
#: Packages that the tests need in addition to torch, which brings its own Triton.
NEEDS = ("hypothesis", "ninja", "numpy", "pytest>=8", "pytest-benchmark>=4", "safetensors>=0.4", "setuptools>=77")
NEEDS += ("torchmetrics>=1.3",)
OLDEST, HEADERS = "2.10.0", "2.11.0"  # HEADERS: the torch that the CUDA kernels are compiled against
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
MINUTES = 20
BUILD_CUDA = (
    "import sys, pathlib; sys.path.insert(0, 'build_backend'); import flowseg_libraries; out = pathlib.Path({!r}); "
    "flowseg_libraries.build_cuda(out, pathlib.Path('build/cuda').resolve(), True)"
)


@dataclasses.dataclass(frozen=True)
class Environment:
    """python: "3.11"; torch: "2.10.0"."""

    python: str
    torch: str

    @property
    def name(self) -> str:
        return f"{self.python} {self.torch}"

    @property
    def folder(self) -> pathlib.Path:
        return FOLDER / f"{self.python}-{self.torch}"

    @property
    def tree(self) -> pathlib.Path:
        return self.folder / "tree"

    @property
    def log(self) -> pathlib.Path:
        return self.folder / "logs" / "make.log"

    def run(self, log: pathlib.Path, *arguments: str, **variables: str) -> int:
        """Run this Python in the copy of the tree, with its output appended to the log. Returns the exit code, 124 on timeout."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        binaries = self.folder / "venv" / "bin"
        environment = {**kept, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", **variables}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            process = subprocess.Popen(
                [str(binaries / "python"), *arguments], cwd=self.tree, env=environment, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(60 * MINUTES)
            except subprocess.TimeoutExpired:
                out.write(f"\nstopped after {MINUTES} minutes\n")
                return 124
            finally:
                # After an interrupt, also kill the processes that the command started.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def make(self, commit: str) -> str | None:
        """Install torch, NEEDS and this project unless that was done at this commit. Returns the step that failed, or None."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        built = self.folder / "commit"
        if is_known(commit) and built.exists() and built.read_text() == commit:
            return None
        built.unlink(missing_ok=True)
        copy_tree(self.tree)
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        installed, packages = self.folder / "installed", (f"torch=={self.torch}", *NEEDS)
        if not installed.exists():
            shutil.rmtree(self.folder / "venv", ignore_errors=True)
            subprocess.run([interpreter(self.python), "-m", "venv", str(self.folder / "venv")], check=True)
        if not installed.exists() or installed.read_text() != str(packages):
            if self.run(self.log, *pip, *packages):
                return "pip install torch"
            installed.write_text(str(packages))
        if self.run(self.log, *pip, "--no-build-isolation", "--no-deps", "--editable", ".", FLOWSEG_BUILD="cpu"):
            return "pip install of this project"
        own = self.python == OWN
        if own:
            built_here = self.tree / "flowseg_kernels" / "lib" / "libflowseg_cpu.so"
            store_library(built_here, library(commit, "cpu", self.torch))
        if own and self.torch == HEADERS and shutil.which("nvcc"):
            target = library(commit, "cuda", self.torch).parent
            if self.run(self.log, "-c", BUILD_CUDA.format(str(target)), TORCH_CUDA_ARCH_LIST="9.0"):
                return "compiling the CUDA kernels"
        built.write_text(commit)
        return None

    def remove(self) -> None:
        """Delete everything except the logs."""
        for part in ("venv", "tree"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        for mark in ("installed", "commit"):
            (self.folder / mark).unlink(missing_ok=True)


def library(commit: str, kind: str, torch: str) -> pathlib.Path:
    """Path of the library of "cpu" or "cuda" kernels that was compiled against a torch."""
    return FOLDER / "libraries" / commit.replace(" ", "_") / f"{kind}-{torch}" / f"libflowseg_{kind}.so"


def libraries(commit: str, kind: str) -> dict[str, pathlib.Path]:
    """The compiled libraries by torch. One Python is enough for them, because they do not depend on Python."""
    found = sorted(library(commit, kind, "").parent.parent.glob(f"{kind}-*/*.so"))
    return {path.parent.name.partition("-")[2]: path for path in found}


def store_library(built: pathlib.Path, to: pathlib.Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".so", ".json"):
        shutil.copy2(built.with_suffix(suffix), to.with_suffix(suffix))


def interpreter(python: str) -> str | None:
    """The interpreter on PATH of a version such as "3.12". It must start: a pyenv shim of an inactive version does not."""
    if python == OWN:
        return sys.executable
    for folder in os.environ["PATH"].split(os.pathsep):
        found = shutil.which(f"python{python}", path=folder)
        if found and subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return found
    return None


def newest(python: str) -> str:
    """The newest torch that pip finds for an interpreter."""
    command = [interpreter(python), "-m", "pip", "index", "versions", "torch"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.match(r"torch \(([^)+]+)", done.stdout)
    if not found:
        raise SystemExit(f"pip finds no torch for Python {python}:\n{done.stderr[-1000:]}")
    return found[1]


def wanted(words: list[str]) -> list[Environment]:
    """The environments of words such as "3.11:2.10.0" or "3.13:newest".

    Without words: this Python with three torches, and every other Python with its newest torch.
    """
    if not words:
        others = [f"3.{minor}" for minor in range(10, 20)]
        words = [f"{OWN}:{torch}" for torch in (OLDEST, HEADERS, "newest")]
        words += [f"{python}:newest" for python in others if python != OWN and interpreter(python)]
    found = []
    for word in words:
        python, _, torch = word.partition(":")
        if not re.fullmatch(r"3\.\d+", python) or not re.fullmatch(r"newest|\d+\.\d+\.\d+", torch):
            raise SystemExit(f"wanted such as 3.11:2.10.0 or 3.13:newest; got {word!r}")
        if not interpreter(python):
            raise SystemExit(f"no python{python} on PATH starts")
        found.append(Environment(python, newest(python) if torch == "newest" else torch))
    return list(dict.fromkeys(found))
