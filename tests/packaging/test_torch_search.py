"""The choice of torch, of GPU architectures and of the number of compilers, with fake interpreters and tools."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from .environment import import_backend

flowseg_architectures = import_backend("flowseg_architectures")
flowseg_jobs = import_backend("flowseg_jobs")
flowseg_torch = import_backend("flowseg_torch")


def interpreter(folder, version="2.13.0", **facts):
    """A program that prints what a Python with this torch would print; version None: a Python without torch."""
    folder.mkdir(parents=True)
    program = folder / "python"
    answer = json.dumps({"version": version, "folder": "FOLDER", "cuda": None} | facts) if version else ""
    # If PYTHONPATH is set, torch's folder is its value: the tests see which PYTHONPATH the interpreter got.
    before, _, after = answer.partition("FOLDER")
    program.write_text(
        f"""#!/bin/sh\nprintf '%s%s%s' '{before}' "${{PYTHONPATH:-/torch}}" '{after}'\n""" if answer else "#!/bin/sh\n"
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """A build in an isolated environment, without other environments around it, started by a process that is not Python."""
    monkeypatch.setattr(flowseg_torch, "_of_this_process", lambda: None)
    monkeypatch.setattr(os, "getppid", lambda: 1 << 30)
    monkeypatch.setattr(sys, "executable", str(interpreter(tmp_path / "isolated", version=None)))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    for name in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.setenv("PWD", str(tmp_path / "work" / "deep"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'isolated'}:/nowhere")
    monkeypatch.setattr(flowseg_torch.Path, "cwd", lambda: tmp_path / "isolated")
    return tmp_path


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT"])
def test_the_torch_of_the_active_environment_is_used(isolated, monkeypatch, variable):
    program = interpreter(isolated / "active" / "bin", version="2.11.0+cu130", cuda="13.0")
    monkeypatch.setenv(variable, str(isolated / "active"))
    found = flowseg_torch.find_torch()
    assert (found.version, found.cuda, found.owner) == ("2.11.0+cu130", "13.0", str(program))


def test_the_torch_of_an_environment_in_the_callers_folder_or_above_is_used(isolated):
    program = interpreter(isolated / "work" / ".venv" / "bin")
    assert flowseg_torch.find_torch().owner == str(program)


def test_the_torch_of_a_later_python_of_path_is_used(isolated, monkeypatch):
    """The first Python of PATH is that of the isolated environment, which has no torch."""
    program = interpreter(isolated / "active" / "bin")
    monkeypatch.setenv("PATH", f"{isolated / 'isolated'}:{program.parent}")
    assert flowseg_torch.find_torch().owner == str(program)


def test_the_active_environment_in_path_comes_before_one_in_the_callers_folder(isolated, monkeypatch):
    program, other = interpreter(isolated / "active" / "bin"), interpreter(isolated / "work" / ".venv" / "bin")
    monkeypatch.setenv("PATH", f"{isolated / 'isolated'}:{program.parent}")
    assert flowseg_torch.find_torch().owner == str(other), "a folder of PATH without pyvenv.cfg is not an environment"
    (isolated / "active" / "pyvenv.cfg").touch()
    assert flowseg_torch.find_torch().owner == str(program)


def test_the_torch_of_the_base_python_is_used(isolated):
    program = interpreter(isolated / "base" / "bin")
    assert flowseg_torch.find_torch().owner == str(program)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
@pytest.mark.parametrize("words", [("--python", "{}"), ("--python={}",), ("-p", "{}/bin/python")])
def test_the_torch_of_the_python_that_the_installer_was_told_is_used(isolated, monkeypatch, words):
    program = interpreter(isolated / "target" / "bin")
    arguments = [word.format(isolated / "target") for word in words]
    command = [sys._base_executable, "-c", "print(flush=True); input()", "pip", "install", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={"PYTHONPATH": "/of/the/caller"}, **pipes) as installer:
        installer.stdout.readline()
        monkeypatch.setattr(os, "getppid", lambda: installer.pid)
        found = flowseg_torch.find_torch()
        installer.communicate(b"\n")
    assert found.owner == str(program)
    assert str(found.folder) == ("/of/the/caller" if "bin" in arguments[-1] else "/torch")


def test_an_older_or_broken_torch_is_passed_over_for_a_usable_one(isolated, monkeypatch):
    interpreter(isolated / "active" / "bin", version="2.8.0")
    monkeypatch.setenv("VIRTUAL_ENV", str(isolated / "active"))
    with pytest.raises(flowseg_torch.Unbuildable, match=r"torch 2\.8\.0 of .*active/bin/python is older than 2\.10"):
        flowseg_torch.find_torch()
    broken = isolated / "work" / ".venv" / "bin"
    interpreter(broken, error="ImportError: libcudart is missing")
    program = interpreter(isolated / "base" / "bin")
    assert flowseg_torch.find_torch().owner == str(program)


def test_without_any_torch_the_reason_names_where_it_was_looked_for(isolated, monkeypatch):
    program = interpreter(isolated / "active" / "bin", version=None)
    monkeypatch.setenv("VIRTUAL_ENV", str(isolated / "active"))
    with pytest.raises(
        flowseg_torch.Unbuildable, match=rf"no torch was found \(asked: {program}\); install torch first"
    ):
        flowseg_torch.find_torch()


def test_a_torch_of_the_build_itself_comes_first(monkeypatch):
    """Without isolation the library will be loaded into this torch, so no other torch is even looked for."""
    monkeypatch.setattr(flowseg_torch, "interpreters", lambda: pytest.fail("another was asked"))
    assert flowseg_torch.find_torch().folder == flowseg_torch.Path(importlib.util.find_spec("torch").origin).parent


KNOWN = "compute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\ncompute_100\ncompute_120"


def flags(monkeypatch, asked, known=KNOWN, gpus=()):
    """Return (what nvcc would compile, such as "sm_90 compute_90"; the printed lines)."""
    if asked is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(flowseg_architectures, "of_gpus", lambda: list(gpus))
    said = []
    found = flowseg_architectures.code_flags(known, said.append)
    return " ".join(flag.rpartition("=")[2] for flag in found.split()), said


@pytest.mark.parametrize(
    "asked, compiled, left_out",
    [
        ("9.0", "sm_90", None),
        ("9.0a;8.0+PTX", "sm_90a sm_80 compute_80", None),
        ("8.0,8.6 9.0", "sm_80 sm_86 sm_90", None),
        ("Ampere", "sm_80 sm_86 compute_86", None),
        ("Hopper;8.0", "sm_90 compute_90 sm_80", None),
        ("hopper+PTX", "sm_90 compute_90", None),
        ("5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0+PTX", "sm_80 sm_86 sm_90 compute_90", "5.2, 6.0, 6.1, 7.0, 7.5 (the kernels need 8.0"),
        ("Turing Ada", "sm_89 compute_89", "7.5 (the kernels need 8.0 or newer)"),
        ("7.0;9.0;10.3", "sm_90", "7.0 (the kernels need 8.0 or newer) and 10.3 (this nvcc does not know it)"),
    ],
)  # fmt: skip
def test_lists_of_architectures_that_other_projects_use_are_understood(monkeypatch, asked, compiled, left_out):
    found, said = flags(monkeypatch, asked)
    assert found == compiled
    assert (len(said) == 1 and left_out in said[0] and "TORCH_CUDA_ARCH_LIST" in said[0]) if left_out else not said


@pytest.mark.parametrize(
    "asked, words",
    [
        ("5.2;7.0", "TORCH_CUDA_ARCH_LIST: no GPU architecture remains without 5.2, 7.0 .the kernels need 8.0 or newer."),
        ("12.1", "no GPU architecture remains without 12.1 .this nvcc does not know it."),
        ("9.0;newest", "wanted entries such as 9.0, 12.0.PTX or Ampere; got 'newest'"),
        ("9.0+PTXX", "got '9.0.PTXX'"),
    ],
)  # fmt: skip
def test_a_list_without_a_usable_architecture_is_an_error(monkeypatch, asked, words):
    with pytest.raises(flowseg_torch.Unbuildable, match=words):
        flags(monkeypatch, asked)


def test_without_a_list_the_architectures_are_those_of_the_gpus_here_or_the_default(monkeypatch):
    assert flags(monkeypatch, None) == ("sm_80 sm_90 compute_90", [])
    assert flags(monkeypatch, "native", gpus=["8.9+PTX"]) == ("sm_89 compute_89", [])
    assert flags(monkeypatch, None, gpus=["8.6+PTX", "9.0+PTX"]) == ("sm_86 compute_86 sm_90 compute_90", [])
    old_nvcc = flags(monkeypatch, "", known="compute_80 compute_86")
    assert old_nvcc == ("sm_80", ["architectures: left out 9.0 (this nvcc does not know it)"])


@pytest.mark.parametrize(
    "asked, nvcc, words",
    [
        ("8.0;9.0", "12.0", None), ("9.0a", "13.0", None), ("9.0+PTX", "?", None), ("Hopper", "12.8", None),
        ("8.0;8.9+PTX", "13.0", "have no 9.0"), ("10.0", "13.0", "have no 9.0"),
        ("9.0", "11.8", "nvcc 11.8 does not know sm_90a; 12.0 or newer does"),
    ],
)  # fmt: skip
def test_code_for_hopper_alone_needs_9_0_in_the_list_and_nvcc_12(monkeypatch, asked, nvcc, words):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    flags = flowseg_architectures.code_flags(KNOWN, print)
    reason = flowseg_architectures.why_no_hopper_code(flags, nvcc)
    assert reason is None if words is None else words in reason


def test_the_driver_lists_the_gpus_and_old_ones_do_not_count(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '9.0\\n6.1\\n9.0\\n[N/A]\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert flowseg_architectures.of_gpus() == ["9.0+PTX"]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert flowseg_architectures.of_gpus() == []


def test_the_number_of_compilers_follows_cores_memory_and_the_limits_of_the_container(monkeypatch, tmp_path):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(flowseg_jobs, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(flowseg_jobs, "_group", lambda: tmp_path)
    (tmp_path / "memory.max").write_text(f"{5 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{4 * 2**30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2 * 2**30}\n")
    free = flowseg_jobs.free_gib()
    assert free <= 3 and flowseg_jobs.jobs(1.0) == max(1, int(free))
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert flowseg_jobs.cores() == 2 and flowseg_jobs.jobs(1e9) == 1
    monkeypatch.setenv("MAX_JOBS", "1")
    assert flowseg_jobs.jobs(0.001) == 1
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match="MAX_JOBS: wanted a whole number"):
        flowseg_jobs.jobs(1.0)
