"""The limits of this machine, measured: what its multiply pipes and the correction's arithmetic give, and memory in use."""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

import torch


@functools.cache
def _pipes():
    """The compiled loops of pipes.cpp; None without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    source = pathlib.Path(__file__).with_name("pipes.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "pipes.so"
        flags = "-std=c++17 -O3 -march=native -shared -fPIC -pthread".split()
        command = [*compiler.split(), *flags, str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        pipes = ctypes.CDLL(str(library))
    for function in (pipes.fused_multiply_adds, pipes.pairs):
        function.restype = ctypes.c_double
    return pipes


def multiply_adds(threads, rounds=2_000_000):
    """Fused multiply-adds a second over some threads of this CPU; None without a C++ compiler."""
    pipes = _pipes()
    return pipes and pipes.fused_multiply_adds(threads, ctypes.c_long(rounds))


def pairs(channels, threads, rounds=2_000_000):
    """Pairs of a pixel and a class a second that the correction's bare arithmetic gets through; None without a C++ compiler."""
    pipes = _pipes()
    # A pair is some 3 C + 3 instructions: about as long for each number of channels.
    return pipes and pipes.pairs(channels, threads, ctypes.c_long(rounds // (3 * channels + 3)))


def _resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) / 1024 for name, value in lines.items()}


def peak_mib(run, device):
    """How far the memory of this process (or of the GPU) rises above what it held while run() works, which it does once; None
    where nobody can tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    try:
        # Freed blocks that the allocator kept would hide what the call asks for.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak := current
    except (AttributeError, OSError):
        run()
        return None
    held = _resident()["VmRSS"]
    run()
    return max(_resident()["VmHWM"] - held, 0.0)
