"""What the build says and leaves out when something is missing or asked for in vain."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from unittest import mock

import pytest

from .environment import ROOT, build, no_compiler

#: Where setuptools collects what goes into a wheel; it keeps what an earlier build left there.
BUILD_LIB = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/flowseg_kernels/lib"


def test_kernels_of_an_earlier_build_are_not_packed(sources, tmp_path):
    folder = tmp_path / "a folder with spaces"
    shutil.copytree(sources, folder)
    for library in (folder / "flowseg_kernels" / "lib" / "libflowseg_cpu.so", folder / BUILD_LIB / "libflowseg_cpu.so"):
        library.parent.mkdir(parents=True, exist_ok=True)
        library.write_bytes(b"stale")
    for variables in ({"FLOWSEG_BUILD": "none"}, no_compiler(tmp_path)):
        out = tmp_path / f"out{len(variables)}"
        _, wheel = build(folder, out, **variables)
        assert wheel.name.endswith("-py3-none-any.whl")
        assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


def test_nothing_compiled_on_request_removes_the_kernels_of_an_earlier_build_in_place(sources, tmp_path):
    """What an editable installation and `setup.py build_ext --inplace` do: the old library would be loaded from there."""
    folder = tmp_path / "sources"
    shutil.copytree(sources, folder)
    lib = folder / "flowseg_kernels" / "lib"
    for name in ("libflowseg_cpu.so", "libflowseg_cpu.json", "libflowseg_cuda.so", "libflowseg_cuda.json"):
        (lib / name).write_text("{}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "FLOWSEG_BUILD": "none"}
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in lib.glob("*.*") if path.suffix) == ["build.json"]
    assert json.loads((lib / "build.json").read_text()) == {"build": "none", "left_out": {}}


def test_what_the_compilers_print_is_shown_as_it_comes(tmp_path, monkeypatch):
    """`pip -v` shows the progress of a build that takes minutes; the stand-in for ninja waits until its first line was seen."""
    spec = importlib.util.spec_from_file_location("flowseg_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(setup)
    ninja = tmp_path / "ninja"
    wait = f"for i in $(seq 600); do [ -e {tmp_path}/seen ] && echo '[2/2] C++ b.o' && exit 0; sleep 0.05; done; exit 1"
    ninja.write_text(f"#!/bin/sh\necho '[1/2] C++ a.o'\n{wait}\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(setup, "find_ninja", lambda: str(ninja))
    shown = []
    show = lambda line: (shown.append(line), (tmp_path / "seen").touch())  # noqa: E731
    setup.compile_library(tmp_path / "lib.so", tmp_path / "work", lambda target: "", 1, show)
    assert shown == ["[1/2] C++ a.o", "[2/2] C++ b.o"]


def test_a_torch_that_does_not_import_leaves_the_kernels_out(sources, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    done, wheel = build(sources, tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert wheel is not None, done.stdout[-2000:]
    assert "left out: torch does not import here (ImportError: libcudart is missing)" in done.stdout + done.stderr


def test_asking_for_kernels_without_a_compiler_is_an_error(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="cpu", **no_compiler(tmp_path))
    assert done.returncode and wheel is None
    assert "FLOWSEG_BUILD=cpu: no C++ compiler was found" in done.stdout + done.stderr


def test_an_unknown_build_mode_says_what_is_wrong(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="gpu")
    assert done.returncode and wheel is None
    assert "wanted auto, cpu, cuda or none; got 'gpu'" in done.stdout + done.stderr


def test_asking_for_cuda_kernels_without_a_compiler_is_an_error(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="cuda", **no_compiler(tmp_path))
    assert done.returncode and wheel is None
    assert "FLOWSEG_BUILD=cuda: no C++ compiler was found" in done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("entry, words", [("9.0", ""), ("newest", "TORCH_CUDA_ARCH_LIST: wanted entries such as 9.0")])
def test_architectures_to_compile_for(monkeypatch, tmp_path, entry, words):
    code = "import sys; sys.argv = ['setup.py', '--name']; import setup; print(setup.code_flags(setup.find_nvcc()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": entry},
    )
    assert words in done.stderr and (bool(words) or done.stdout.endswith("-gencode=arch=compute_90,code=sm_90\n"))


def test_nothing_compiled_on_request_gives_a_wheel_for_every_platform(sources, tmp_path):
    _, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"flowseg", "flowseg_kernels"}
