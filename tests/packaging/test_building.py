"""Builds in which something is missing or FLOWSEG_BUILD asks for the impossible: what is left out, and the messages."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from .environment import build, import_backend, no_compiler

#: The folder in which setuptools collects the files of a wheel. Files of an earlier build stay there.
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


def test_a_build_without_kernels_removes_the_kernels_of_an_earlier_build_in_place(sources, tmp_path):
    """An editable installation and `setup.py build_ext --inplace` build in the source tree, from which a library is loaded."""
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


def test_the_output_of_the_compilers_is_shown_while_they_run(tmp_path, monkeypatch):
    """`pip -v` shows the progress of a build that takes minutes. The fake ninja waits until its first line was seen."""
    libraries = import_backend("flowseg_libraries")
    ninja = tmp_path / "ninja"
    wait = f"for i in $(seq 600); do [ -e {tmp_path}/seen ] && echo '[2/2] C++ b.o' && exit 0; sleep 0.05; done; exit 1"
    ninja.write_text(f"#!/bin/sh\necho '[1/2] C++ a.o'\n{wait}\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(libraries, "find_ninja", lambda: str(ninja))
    shown = []
    show = lambda line: (shown.append(line), (tmp_path / "seen").touch())  # noqa: E731
    libraries.compile_library(tmp_path / "lib.so", tmp_path / "work", "", 1, show)
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


def test_an_unknown_build_mode_is_an_error(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="gpu")
    assert done.returncode and wheel is None
    assert "wanted auto, cpu, cuda or none; got 'gpu'" in done.stdout + done.stderr


def test_asking_for_cuda_kernels_without_a_compiler_is_an_error(sources, tmp_path):
    done, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="cuda", **no_compiler(tmp_path))
    assert done.returncode and wheel is None
    assert "FLOWSEG_BUILD=cuda: no C++ compiler was found" in done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_architectures_to_compile_for(monkeypatch):
    libraries = import_backend("flowseg_libraries")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert libraries.architecture_flags(libraries.find_nvcc()) == "-gencode=arch=compute_90,code=sm_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "newest")
    with pytest.raises(libraries.Unbuildable, match=r"TORCH_CUDA_ARCH_LIST: wanted entries such as 9\.0"):
        libraries.architecture_flags(libraries.find_nvcc())


@pytest.mark.parametrize(
    "asked, release, left_out",
    [
        ("8.0;9.0", "13.0", None),
        ("8.0", "13.0", "the architectures to compile for have no 9.0"),
        ("9.0", "11.8", "nvcc 11.8 does not know sm_90a; 12.0 or newer does"),
    ],
)
def test_the_field_is_compiled_for_hopper_alone_or_left_out_with_the_reason(
    monkeypatch, tmp_path, asked, release, left_out
):
    """The other kernels are compiled for every architecture of the list, and never with instructions of sm_90a."""
    libraries = import_backend("flowseg_libraries")
    folder = tmp_path / "bin"
    folder.mkdir()
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    texts, said = [], []
    monkeypatch.setattr(libraries, "compile_library", lambda path, work, text, *rest: texts.append(text))
    monkeypatch.setattr(libraries, "say", said.append)
    libraries.build_cuda(tmp_path, tmp_path / "work", True)
    flags = dict(re.findall(r"^build (\w+)\.o: compile .*\n  more = (.*)$", texts[0], re.MULTILINE))
    field = flags.pop("neural_field", None)
    others = set(import_backend("flowseg_ninja").CUDA_OPS) - {"neural_field"}
    assert set(flags) == others and set(flags.values()) == {libraries.architecture_flags(str(nvcc))}
    assert " -gencode" not in texts[0].partition("build ")[0]
    assert field == (None if left_out else "-gencode=arch=compute_90a,code=sm_90a")
    facts = json.loads((tmp_path / "libflowseg_cuda.json").read_text())
    assert facts["left_out"] == ({"neural_field": left_out} if left_out else {})
    assert said == ([f"CUDA kernels of neural_field left out: {left_out}"] if left_out else [])


def test_a_build_without_kernels_gives_a_wheel_for_every_platform(sources, tmp_path):
    _, wheel = build(sources, tmp_path / "out", FLOWSEG_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"flowseg", "flowseg_kernels"}
