"""How many compilers run at once: one per core that this process may use, as far as the memory that is free goes."""

import os
import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def jobs(gib_each: float) -> int:
    """At least 1. gib_each: memory of one compiler. MAX_JOBS sets an upper limit."""
    asked = os.environ.get("MAX_JOBS") or "0"
    if not asked.isdigit():
        raise SystemExit(f"MAX_JOBS: wanted a whole number of compile jobs; got {asked!r}")
    limits = [cores(), int(free_gib() / gib_each), *([int(asked)] if int(asked) else [])]
    return max(1, min(limits))


def cores() -> int:
    """Cores of this process's affinity and of its container's quota, rounded up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.fullmatch(r"(\d+) (\d+)", _text(_group() / "cpu.max"))
    return min(found, -(-int(quota[1]) // int(quota[2]))) if quota else found


def free_gib() -> float:
    """Memory that programs can have without swapping, of the machine and of this process's container; 4 where nobody tells."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    free = [int(available[1]) / 2**20] if available else []
    group = _group()
    limit, used = _text(group / "memory.max"), _text(group / "memory.current")
    if limit.isdigit() and used.isdigit():
        cache = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
        free.append((int(limit) - int(used) + (int(cache[1]) if cache else 0)) / 2**30)
    return max(0.0, min(free)) if free else 4.0


def _group() -> Path:
    """This process's control group; a container sees its own as the root."""
    name = re.search(r"^0::/(.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    folder = CGROUP / name[1] if name else CGROUP
    return folder if (folder / "memory.max").exists() else CGROUP


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
