"""The command that compiles the kernels, for the way in which this package was installed."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import sys
import urllib.parse
import urllib.request
from pathlib import Path

__all__ = ["compile_command"]

_PACKAGE = Path(__file__).resolve().parent.parent
_NAME = "flowseg-kernels"
#: Stands for a clone of the project, where nothing tells where the sources are.
_CLONE = ".  # in a clone of the project"
#: What a build without isolation needs beside torch and a compiler, as pyproject.toml has it.
_TOOLS = "'setuptools>=77' ninja"


def compile_command(build: str) -> str:
    """A shell command that installs this package with its kernels into this environment, or fails with what is missing.

    The environment needs nothing but torch: the command brings the build tools, and builds without isolation, so that
    the kernels are compiled against this environment's torch.

    Args:
        build: value of FLOWSEG_BUILD, "cpu" or "cuda".
    """
    python, source = shlex.quote(sys.executable), _source()
    if _distribution_text("INSTALLER").strip() == "uv":
        install = f"uv pip install --python {python}"
        again = "--reinstall"
    else:
        install = f"{python} -m pip install"
        again = "--no-cache-dir --force-reinstall"
    return f"{install} {_TOOLS} && FLOWSEG_BUILD={build} {install} --no-build-isolation {again} --no-deps {source}"


def _source() -> str:
    """What to install from, as pip takes it: the checkout that is imported, else where the installed copy came from."""
    checkout = _PACKAGE.parent
    if (checkout / "setup.py").exists() and (checkout / "csrc").is_dir():
        return f"-e {shlex.quote(str(checkout))}"
    try:
        origin = json.loads(_distribution_text("direct_url.json"))
        url = origin["url"]
    except (ValueError, KeyError):
        return _CLONE
    if "vcs_info" in origin:
        return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
    address = urllib.parse.urlparse(url)
    path = Path(urllib.request.url2pathname(address.path))
    if address.scheme != "file" or path.suffix == ".whl" or not path.exists():
        return _CLONE
    return shlex.quote(str(path))


def _distribution_text(name: str) -> str:
    """A file of the metadata of the distribution that holds this package; "" without one."""
    try:
        distribution = importlib.metadata.distribution(_NAME)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return distribution.read_text(name) or ""
