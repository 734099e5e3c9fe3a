"""Compiles the libraries libflowseg_cpu.so and libflowseg_cuda.so, and writes how each was built to a .json file next to it."""

import contextlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flowseg_architectures
from flowseg_jobs import jobs
from flowseg_ninja import CUDA_OPS, HOPPER_OPS, X86, cpu_ninja_file, cuda_ninja_file
from flowseg_toolchain import ROOT, Unbuildable, find_compiler, find_ninja, find_nvcc, output, require_linux
from flowseg_torch import TORCH_TARGET, find_torch

CPU_LIBRARY, CUDA_LIBRARY = "libflowseg_cpu.so", "libflowseg_cuda.so"
#: Peak memory of one compiler, in GiB.
CPU_GIB, CUDA_GIB = 1.0, 1.0


def say(text: str) -> None:
    """Print one line for whoever installs the project."""
    line = f"flowseg-kernels: {text}"
    print(line, file=sys.stderr)
    # pip shows the output of a build only with -v. A plain install on a terminal should still say what it left out.
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(line, file=terminal)


def no_progress(line: str) -> None:
    """Ignore a line of a compiler."""


def build_cpu(
    folder: Path,
    work: Path,
    show: Callable[[str], None] = no_progress,
    *,
    root: Path = ROOT,
    instruction_sets: bool = X86,
) -> None:
    """Compile csrc/cpu to folder/libflowseg_cpu.so.

    Args:
        work: folder for the objects.
        show: called with each line that the compilers print, as they print it.
        root: the tree with the sources.
        instruction_sets: False to compile for the baseline instruction set only, in a third of the time.

    Raises:
        Unbuildable: if something is missing or the sources do not compile.
    """
    require_linux()
    compiler = find_compiler()
    torch = find_torch()
    show(f"C++ kernels: compiling with {compiler}, against torch {torch.version} of {torch.owner}")
    library = folder / CPU_LIBRARY
    text = cpu_ninja_file(compiler, torch.folder, library.resolve(), root=root, instruction_sets=instruction_sets)
    compile_library(library, work, text, jobs(CPU_GIB), show)
    version = (output(*compiler.split(), "--version").splitlines() or ["?"])[0]
    write_record(library, {"compiler": version, "torch": torch.version})


def build_cuda(
    folder: Path,
    work: Path,
    forced: bool,
    show: Callable[[str], None] = no_progress,
    *,
    ops: tuple[str, ...] = CUDA_OPS,
) -> None:
    """Compile csrc/cuda to folder/libflowseg_cuda.so.

    Args:
        work: folder for the objects.
        forced: compile for a torch without CUDA too.
        show: called with each line that the compilers print, as they print it.
        ops: the ops to compile. Those of HOPPER_OPS are left out, with the reason in the record, if nothing is compiled for 9.0.

    Raises:
        Unbuildable: if something is missing or the sources do not compile.
    """
    require_linux()
    torch = find_torch()
    if not torch.cuda and not forced:
        raise Unbuildable(f"torch {torch.version} is built without CUDA")
    nvcc = find_nvcc()
    flags = architecture_flags(nvcc)
    release = re.search(r"release (\S+),", output(nvcc, "--version"))
    without = flowseg_architectures.why_no_hopper_code(flags, release[1] if release else "?")
    left_out = {op: without for op in ops if without and op in HOPPER_OPS}
    for op, reason in left_out.items():
        say(f"CUDA kernels of {op} left out: {reason}")
    architectures = ", ".join(re.findall(r",code=(\w+)", flags))
    show(f"CUDA kernels: compiling for {architectures} with {nvcc}, against torch {torch.version} of {torch.owner}")
    library, at_once = folder / CUDA_LIBRARY, jobs(CUDA_GIB)
    compiled = tuple(op for op in ops if op not in left_out)
    text = cuda_ninja_file(nvcc, flags, torch.folder, library.resolve(), at_once, ops=compiled)
    compile_library(library, work, text, at_once, show)
    facts = {
        "compiler": f"nvcc {release[1] if release else '?'}",
        "architectures": architectures,
        "left_out": left_out,
        **({"cuda_runtime": release[1]} if release else {}),
        "torch": torch.version,
    }
    write_record(library, facts)


def architecture_flags(nvcc: str) -> str:
    """nvcc's -gencode flags for the architectures that are asked for and that this nvcc supports."""
    return flowseg_architectures.code_flags(output(nvcc, "--list-gpu-arch"), say)


def compile_library(path: Path, work: Path, ninja_file: str, at_once: int, show: Callable[[str], None]) -> None:
    """Run ninja in `work`, with `at_once` compilers in parallel. The output of a build that fails is left in work/build.log."""
    ninja = find_ninja()
    path.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file)
    command = [ninja, "-C", str(work), f"-j{at_once}"]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            lines.append(line)
            show(line.rstrip("\n"))
    if process.returncode:
        log = work / "build.log"
        log.write_text("".join(lines))
        errors = [line.strip() for line in lines if "error" in line.lower()] or ["no message"]
        raise Unbuildable(f"the sources did not compile: {errors[0]} (all of it: {log})")


def write_record(library: Path, facts: dict) -> None:
    """Write the facts of a build, with the commit and the machine, to the .json file next to the library."""
    commit = output("git", "rev-parse", "--short", "HEAD") or None
    facts = {**facts, "torch_target": TORCH_TARGET, "commit": commit, "machine": platform.machine()}
    library.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
