"""The source distribution and the wheel built from it, once for all packaging tests."""

import os
import shutil
import subprocess
import sys

import pytest

from .environment import ROOT, FreshEnvironment, build


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A copy of the tracked files: a build must not see files that an earlier build left in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def sdist(sources, tmp_path_factory):
    """The source distribution, made in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("sdist") / "a folder"
    shutil.copytree(sources, folder)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(folder / "dist")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def compiled(sdist, tmp_path_factory):
    """(wheel with the C++ kernels, the fresh environment that it is installed in).

    The wheel is built as uv and pip build it: in an environment without torch. The build finds torch in the active environment.
    """
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("compiled")
    fresh = FreshEnvironment(folder / "venv")
    isolated = FreshEnvironment(folder / "isolated", packages=("setuptools",))
    done, wheel = build(
        sdist,
        folder / "out",
        python=isolated.python,
        FLOWSEG_BUILD="cpu",
        VIRTUAL_ENV=str(fresh.folder),
        # Without optimisation the kernels compile six times as fast.
        FLOWSEG_CXXFLAGS=os.environ.get("FLOWSEG_CXXFLAGS", "-O0"),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    fresh.install(wheel)
    return wheel, fresh
