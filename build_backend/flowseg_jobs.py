"""How many compilers run at once: one per core that this process may use, or fewer if free memory is short."""

import os
import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def jobs(gib_each: float) -> int:
    """The number of compilers to run at once, at least 1. `gib_each` is the memory of one compiler; MAX_JOBS is an upper limit."""
    asked = os.environ.get("MAX_JOBS") or "0"
    if not asked.isdigit():
        raise SystemExit(f"MAX_JOBS: wanted a whole number of compile jobs; got {asked!r}")
    limits = [cores(), int(free_gib() / gib_each), *([int(asked)] if int(asked) else [])]
    return max(1, min(limits))


def cores() -> int:
    """The cores that this process may use: the smaller of its affinity and its container's quota, rounded up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.fullmatch(r"(\d+) (\d+)", _text(_group() / "cpu.max"))
    return min(found, -(-int(quota[1]) // int(quota[2]))) if quota else found


def free_gib() -> float:
    """Memory available without swapping, in the machine and in this process's container; 4 GiB if unknown."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    free = [int(available[1]) / 2**20] if available else []
    group = _group()
    limit, used = _text(group / "memory.max"), _text(group / "memory.current")
    if limit.isdigit() and used.isdigit():
        cache = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
        free.append((int(limit) - int(used) + (int(cache[1]) if cache else 0)) / 2**30)
    return max(0.0, min(free)) if free else 4.0


def _group() -> Path:
    """The control group of this process. A container sees its own group as the root."""
    name = re.search(r"^0::/(.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    folder = CGROUP / name[1] if name else CGROUP
    return folder if (folder / "memory.max").exists() else CGROUP


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
