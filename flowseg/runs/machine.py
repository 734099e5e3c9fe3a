"""The CPU of this machine: its model, and how many of its cores this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cpu_model() -> str:
    """The model name of this CPU; ``""`` where ``/proc/cpuinfo`` does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def usable_cores() -> int:
    """Number of cores that this process may use, by its affinity and by the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(max(1, min(cores, _cpu_quota())))


def local_processes() -> int:
    """Number of processes of this run on this machine, which share its cores and memory. Launchers tell it."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cores_per_process() -> int:
    """Number of cores for each process of this run on this machine, at least 1."""
    return max(1, usable_cores() // local_processes())


def _cpu_quota() -> float:
    """The quota of the control group (version 2 or 1) in cores; infinite without one."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        files = (CGROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota, period = (int(file.read_text(encoding="utf-8")) for file in files)
        return quota / period if quota > 0 else math.inf
    return math.inf
