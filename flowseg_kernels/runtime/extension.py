"""Finds and loads the compiled CPU library; on failure keeps one readable reason instead of raising."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import settings

__all__ = ["CPU_LIBRARY", "build_facts", "why_no_cpu_kernels"]

_FOLDER = Path(__file__).resolve().parent.parent / "lib"
#: The shared object of the CPU kernels. It needs no Python and only the stable ABI of torch.
CPU_LIBRARY = _FOLDER / "libflowseg_cpu.so"

_REBUILD = "rebuild it with: FLOWSEG_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps ."


def build_facts() -> dict:
    """What the CPU library was built with (compiler, flags, torch, commit), or {} when it was not built."""
    facts = CPU_LIBRARY.with_suffix(".json")
    try:
        return json.loads(facts.read_text())
    except (OSError, ValueError):
        return {}


def _load() -> str | None:
    if settings.DISABLE_EXTENSION:
        return "FLOWSEG_DISABLE_EXTENSION=1 is set"
    if not CPU_LIBRARY.exists():
        return f"the C++ kernels were not compiled when flowseg-kernels was installed; with a C++ compiler, {_REBUILD}"
    facts = build_facts()
    floor = facts.get("torch_target", "2.10")
    if tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]) < tuple(int(p) for p in floor.split(".")):
        return f"the library needs torch {floor} or newer and this is torch {torch.__version__}; upgrade torch"
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except (OSError, RuntimeError) as error:
        return (
            f"{CPU_LIBRARY.name}, built with torch {facts.get('torch', '?')} for stable ABI {floor}, "
            f"does not load into torch {torch.__version__} ({error}); {_REBUILD}"
        )
    return None


_REASON: str | bool | None = False


def why_no_cpu_kernels() -> str | None:
    """None when the CPU kernels are loaded (loading them at the first call), else the reason in one sentence."""
    global _REASON
    if _REASON is False:
        _REASON = _load()
    return _REASON
