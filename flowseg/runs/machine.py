"""The model of the CPU."""

from __future__ import annotations

from pathlib import Path


def cpu_model() -> str:
    """The model name of this CPU; ``""`` where ``/proc/cpuinfo`` does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
