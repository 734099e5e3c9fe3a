"""Helpers of the packaging tests: a build as pip runs it, and environments that contain only torch."""

import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
#: Encodes and decodes labels, runs one op forward and backward, and prints the op's backend and whether there is a gradient.
ONE_OP = """
import torch, flowseg_kernels as fk
book = fk.Codebook(fk.kronecker_centroids(9))
labels = torch.randint(0, 9, (1, 8, 8))
assert torch.equal(book.decode(book.encode(labels)), labels)
x = book.encode(labels).requires_grad_()
fk.flow_loss(x, torch.zeros_like(x), labels, torch.zeros(1), book).backward()
print(fk.available_backends("flow_loss")[0], x.grad.abs().sum() > 0)
"""


def import_backend(name):
    """A module of build_backend/."""
    if str(ROOT / "build_backend") not in sys.path:
        sys.path.insert(0, str(ROOT / "build_backend"))
    return importlib.import_module(name)


def build(sources, out, *, python=sys.executable, **variables):
    """Run `pip wheel` as an installer does. Returns (completed process, wheel or None)."""
    command = [
        sys.executable, "-m", "pip", "--python", python, "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation",
        "-w", out, sources,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **variables})
    wheels = list(pathlib.Path(out).glob("*.whl"))
    return done, wheels[0] if wheels else None


def no_compiler(folder):
    """Environment variables for a build that finds ninja, git and sh, but no C++ compiler, no C compiler and no nvcc."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("ninja", "git", "sh"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    return {"PATH": str(tools), "CXX": "", "CC": "", "CUDA_HOME": "", "CUDA_PATH": ""}


def _required(name, found):
    """Add the distributions that `name` requires to `found`, without Triton, setuptools and optional requirements."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    found[name] = distribution
    for line in distribution.requires or ():
        wanted = re.match(r"[\w.-]+", line)[0]
        if "extra ==" not in line and wanted not in ("triton", "setuptools") and wanted not in found:
            _required(wanted, found)


def link_packages(prefix, packages):
    """Link distributions of this Python and their requirements into the site-packages of `prefix`. Returns that folder."""
    site = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for name in packages:
        _required(name, wanted)
    for distribution in wanted.values():
        for top in {f.parts[0] for f in distribution.files if f.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return site


class FreshEnvironment:
    """A virtual environment with links to torch, its requirements and setuptools, but without Triton, NumPy and pytest.

    packages: the distributions to link; ("setuptools",) gives the isolated environment that an installer builds in.
    """

    def __init__(self, folder, packages=("torch", "setuptools")):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site = link_packages(folder, packages)

    def install(self, path, **variables):
        """Install a wheel or a source distribution with pip. Returns pip's output."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "-v", "--no-deps", "--no-index",
                   "--no-build-isolation", path]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **variables})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    def run(self, *arguments, **variables):
        """The output of this environment's Python, run outside the checkout."""
        return self.process(*arguments, **variables).stdout

    def process(self, *arguments, **variables):
        """The completed process of this environment's Python, run outside the checkout."""
        environment = {**os.environ, **variables}
        environment.pop("PYTHONPATH", None)
        if "FLOWSEG_NOTICE" not in variables:
            environment.pop("FLOWSEG_NOTICE", None)
        done = subprocess.run(
            [str(self.python), *arguments], capture_output=True, text=True, env=environment, cwd=self.site
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done
