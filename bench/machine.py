"""Facts about this machine: CPU model, throughput of its arithmetic units, memory in use."""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

import torch

from flowseg.runs.files import replacing
from flowseg.runs.machine import cpu_model

BUILD = pathlib.Path(__file__).resolve().parents[1] / "build" / "bench"


@functools.cache
def _throughput():
    """The compiled loops of throughput.cpp; None without a C++ compiler.

    The library stays in build/bench/ for later processes; its name depends on source, command and CPU.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    source = pathlib.Path(__file__).with_name("throughput.cpp")
    command = [*compiler.split(), *"-std=c++17 -O3 -march=native -shared -fPIC -pthread".split(), str(source)]
    key = hashlib.sha256(source.read_bytes() + repr((command, cpu_model())).encode()).hexdigest()[:16]
    kept = BUILD / f"throughput-{key}.so"
    with tempfile.TemporaryDirectory() as folder:
        path = kept
        if not kept.exists():
            path = pathlib.Path(folder) / kept.name
            if subprocess.run([*command, "-o", str(path)], capture_output=True).returncode:
                return None
            with contextlib.suppress(OSError):  # a read-only checkout compiles in each process
                BUILD.mkdir(parents=True, exist_ok=True)
                with replacing(kept) as part:
                    shutil.copy(path, part)
        library = ctypes.CDLL(str(path))
    for function in (library.fused_multiply_adds, library.pairs):
        function.restype = ctypes.c_double
    return library


def multiply_adds_per_second(threads, rounds=2_000_000):
    """Fused multiply-adds per second of this CPU on `threads` threads; None without a C++ compiler."""
    library = _throughput()
    return library and library.fused_multiply_adds(threads, ctypes.c_long(rounds))


def pairs_per_second(channels, threads, rounds=2_000_000):
    """Pairs of a pixel and a class per second of the correction's arithmetic alone; None without a C++ compiler."""
    library = _throughput()
    # A pair takes about 3 C + 3 instructions; dividing the rounds makes all numbers of channels take about equally long.
    return library and library.pairs(channels, threads, ctypes.c_long(rounds // (3 * channels + 3)))


def resident():
    """Current ("VmRSS") and peak ("VmHWM") resident memory of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in lines.items()}


def peak_mib(run, device):
    """Call run() once; return by how many MiB the memory of this process (or of the GPU) peaks above its level before the call.

    None where the system does not tell.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Freed blocks that the allocator keeps would hide allocations of the call.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current level
    except (AttributeError, OSError):
        run()
        return None
    before = resident()["VmRSS"]
    run()
    return max(resident()["VmHWM"] - before, 0) / 2**20
