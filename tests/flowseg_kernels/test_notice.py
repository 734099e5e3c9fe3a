"""The notice about missing kernels: when it is printed, and the command that it contains."""

import dataclasses
import importlib.metadata
import json
import shlex
import sys

import pytest
import torch

from flowseg_kernels.runtime import backend, extension


@pytest.fixture
def installed_without(monkeypatch, tmp_path):
    """An installation with a build record but no library in its lib folder."""
    (tmp_path / "build.json").write_text(
        json.dumps({"build": "auto", "left_out": {"cpu": "no compiler", "cuda": "no nvcc"}})
    )
    for name in ("CPU", "CUDA"):
        library = getattr(extension, name)
        monkeypatch.setattr(extension, name, dataclasses.replace(library, path=tmp_path / library.path.name))
    for name in ("FLOWSEG_NOTICE", *extension._RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "")
    monkeypatch.setattr(extension, "DISABLE_EXTENSION", False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(extension, "_has_gpu", lambda: False)
    return tmp_path


def printed(capsys):
    extension.say_what_is_missing()
    return capsys.readouterr().err


def test_missing_kernels_are_one_line_with_the_reason_and_the_command_printed_once(installed_without, capsys):
    line = printed(capsys)
    assert line.count("\n") == 1 and line.startswith("flowseg-kernels: the C++ kernels were not compiled")
    assert "(no compiler)" in line and extension.compile_command("cpu") in line and "FLOWSEG_NOTICE=0" in line
    assert printed(capsys) == ""


@pytest.mark.parametrize(
    "name, value", [("FLOWSEG_NOTICE", "0"), ("RANK", "3"), ("LOCAL_RANK", "1"), ("SLURM_PROCID", "2")]
)
def test_a_variable_silences_the_notice_and_only_the_first_of_several_processes_prints_it(
    installed_without, monkeypatch, capsys, name, value
):
    monkeypatch.setenv(name, value)
    assert printed(capsys) == ""


@pytest.mark.parametrize(
    "module, name, value", [(backend, "DEFAULT_BACKEND", "reference"), (extension, "DISABLE_EXTENSION", True)]
)
def test_a_user_who_chose_a_backend_gets_no_notice(installed_without, monkeypatch, capsys, module, name, value):
    monkeypatch.setattr(module, name, value)
    assert printed(capsys) == ""


def test_kernels_left_out_on_purpose_are_not_missed(installed_without, capsys):
    (installed_without / "build.json").write_text(json.dumps({"build": "none", "left_out": {}}))
    assert printed(capsys) == ""
    assert "as FLOWSEG_BUILD=none asked" in extension.CPU.load()


@pytest.mark.parametrize("gpu, cuda, missed", [(True, "13.0", True), (False, "13.0", False), (True, None, False)])
def test_cuda_kernels_are_missed_only_with_a_gpu(installed_without, monkeypatch, capsys, gpu, cuda, missed):
    (installed_without / "libflowseg_cpu.so").write_bytes(b"")
    monkeypatch.setattr(extension, "_has_gpu", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    line = printed(capsys)
    assert (
        "the CUDA kernels were not compiled" in line and "no nvcc" in line and "FLOWSEG_BUILD=cuda" in line
    ) == missed
    assert missed or line == ""


CLONE = ".  # in a clone of the project"


class Distribution:
    def __init__(self, **files):
        self.files = files

    def read_text(self, name):
        return self.files.get(name.partition(".")[0])


@pytest.mark.parametrize(
    "origin, source",
    [
        ({"url": "https://example.org/f.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://example.org/f.git@abc"),
        ({"url": "file://FOLDER/a%20clone", "dir_info": {}}, "'FOLDER/a clone'"),
        ({"url": "file://FOLDER/deleted", "dir_info": {}}, CLONE),
        ({"url": "file://FOLDER/a%20clone/f.whl", "archive_info": {}}, CLONE),
        ({"url": "https://example.org/f.tar.gz", "archive_info": {}}, CLONE),
        (None, CLONE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_the_command_installs_from_where_the_package_came_from_with_the_tool_that_installed_it(
    monkeypatch, tmp_path, origin, source, installer
):
    (tmp_path / "a clone").mkdir()
    text = json.dumps(origin).replace("FOLDER", str(tmp_path)) if origin else None
    distribution = Distribution(INSTALLER=f"{installer}\n", direct_url=text)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path / "site-packages" / "flowseg_kernels")
    command, python = extension.compile_command("cuda"), shlex.quote(sys.executable)
    pip = f"uv pip install --python {python}" if installer == "uv" else f"{python} -m pip install"
    assert command.startswith(f"{pip} 'setuptools>=77' ninja && FLOWSEG_BUILD=cuda {pip} --no-build-isolation ")
    assert command.endswith(f" --no-deps {source.replace('FOLDER', str(tmp_path))}")


def test_the_command_installs_the_checkout_that_is_imported(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path / "flowseg_kernels")
    assert extension.compile_command("cpu").endswith(f" --no-deps -e {tmp_path}")
