"""Finds the torch to compile against: in this process, or in the environment that the project is installed into.

pip, uv, build and poetry build in an isolated environment without torch. The libraries use only torch's stable ABI, so they can be
compiled against any torch from `TORCH_TARGET` on, of any Python.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from flowseg_toolchain import Unbuildable

#: The libraries use the stable ABI of this torch, and run on it and on every later one.
#: flowseg_kernels reads it from the library's JSON file.
TORCH_TARGET = "2.10"

#: Prints facts about torch as JSON, or the reason why torch does not import; prints nothing if there is no torch.
PROBE = """
import importlib.util, json, sys, warnings
warnings.simplefilter("ignore")
if importlib.util.find_spec("torch"):
    try:
        import torch
        facts = {"version": torch.__version__, "folder": torch.__path__[0], "cuda": torch.version.cuda}
    except Exception as error:
        facts = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(facts))
"""


@dataclasses.dataclass(frozen=True)
class Torch:
    """An installed torch.

    version: "2.13.0+cpu"
    folder:  the package
    cuda:    "13.0"; None in a build without CUDA
    owner:   the interpreter that imports it
    """

    version: str
    folder: Path
    cuda: str | None
    owner: str


def find_torch() -> Torch:
    """The torch of this process if it has one, else that of the first interpreter with a usable one. Raises Unbuildable."""
    own = _of_this_process()
    if own:
        return own
    unusable, asked = [], []
    for interpreter, python_path in interpreters():
        try:
            found = _of_interpreter(interpreter, python_path)
        except Unbuildable as reason:
            unusable.append(reason)
            continue
        if found:
            return found
        if interpreter != sys.executable:  # the isolated environment, which the installer deletes
            asked.append(interpreter)
    if unusable:
        raise unusable[0]
    raise Unbuildable(
        f"no torch was found (asked: {', '.join(asked) or 'no other Python'}); install torch first, then this again; for a torch "
        "elsewhere put its environment first in PATH, or build without isolation"
    )


def _of_this_process() -> Torch | None:
    """The torch of this process, if any. It comes first: the libraries will be loaded into it, or it was chosen for the build."""
    if not importlib.util.find_spec("torch"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is no NumPy; the build does not need NumPy
            import torch
    except Exception as error:  # a broken torch must not fail an installation that can leave the kernels out
        raise Unbuildable(f"torch does not import here ({type(error).__name__}: {error})") from None
    return _checked(Torch(torch.__version__, Path(torch.__path__[0]), torch.version.cuda, sys.executable))


def _of_interpreter(interpreter: str, python_path: str) -> Torch | None:
    """The torch that another interpreter imports, from its system or its user site-packages; None without one."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")  # set by installers to isolate the build
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if python_path:
        environment["PYTHONPATH"] = python_path
    try:
        done = subprocess.run(
            [interpreter, "-c", PROBE], cwd="/", env=environment, capture_output=True, text=True, timeout=120
        )
        facts = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if "error" in facts:
        raise Unbuildable(f"torch does not import in {interpreter} ({facts['error']})")
    return _checked(Torch(facts["version"], Path(facts["folder"]), facts["cuda"], interpreter))


def _checked(torch: Torch) -> Torch:
    release = tuple(int(part) for part in torch.version.split("+")[0].split(".")[:2])
    if release < tuple(int(part) for part in TORCH_TARGET.split(".")):
        raise Unbuildable(f"torch {torch.version} of {torch.owner} is older than {TORCH_TARGET}")
    return torch


def interpreters() -> Iterator[tuple[str, str]]:
    """Yield (interpreter, its PYTHONPATH) of the environments that the project may be installed into, each once, likely ones first.

    1. The Python that runs the installer, or that its command line names (pip's target, build's caller, uv's --python).
    2. This Python without the isolation that pip sets up with environment variables.
    3. The active environment, by its variable or its folder in PATH; .venv in the caller's folder or above it, as uv does.
    4. Every other Python in PATH.
    5. The Python that this environment was made from (uv's --system).
    """
    seen = set()
    for candidate, python_path in _candidates():
        folder = candidate.parent.resolve()
        if folder not in seen and os.access(candidate, os.X_OK) and not candidate.is_dir():
            seen.add(folder)
            yield str(candidate), python_path


def _candidates() -> Iterator[tuple[Path, str]]:
    yield from _of_installer()
    yield Path(sys.executable), ""
    folders = []
    for variable in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]) / "bin")
    # uv sets VIRTUAL_ENV to its isolated environment. The caller's active environment is still in PATH.
    path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += [folder for folder in path if (folder.parent / "pyvenv.cfg").exists()]
    # PWD is the caller's folder, even if the installer builds in another one.
    for start in dict.fromkeys((Path(os.environ.get("PWD") or "."), Path.cwd())):
        folders += [folder / ".venv" / "bin" for folder in (start, *start.absolute().parents)]
    folders += path
    for folder in (*folders, Path(sys.base_prefix) / "bin"):
        yield from ((python, "") for python in _pythons(folder))


def _of_installer() -> Iterator[tuple[Path, str]]:
    """Candidates from the parent process, which is pip, uv, build or poetry. It is read from /proc, which only Linux has."""
    process = Path("/proc") / str(os.getppid())
    try:
        arguments = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        folder = Path(os.readlink(process / "cwd"))
    except OSError:
        return
    variables = dict(entry.partition("=")[::2] for entry in environment)
    named = [b for a, b in itertools.pairwise(arguments) if a in ("--python", "-p")]
    named += [word.removeprefix("--python=") for word in arguments if word.startswith("--python=")]
    named += [variables["UV_PYTHON"]] if "UV_PYTHON" in variables else []
    named += arguments[:1] if Path(arguments[0]).name.startswith("python") else []
    for name in named:
        found = shutil.which(name, path=variables.get("PATH", "")) if "/" not in name else folder / name
        if found and Path(found).is_dir():
            yield from ((python, "") for python in _pythons(Path(found) / "bin"))
        elif found:
            yield Path(found), variables.get("PYTHONPATH", "")


def _pythons(folder: Path) -> Iterator[Path]:
    """The interpreters in a folder of programs."""
    names = (folder / name for name in ("python", "python3"))
    yield from (name for name in names if name.exists())
