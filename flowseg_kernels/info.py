"""`python -m flowseg_kernels.info` prints versions, the compiled libraries, and which backend each op will use here and why."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable

import torch

from . import __version__
from .runtime import backend, extension
from .runtime.triton import why_no_triton

__all__ = ["report"]


def _instruction_set(facts: dict) -> str:
    return f"running {('baseline', 'AVX2', 'AVX-512')[torch.ops.flowseg_cpu.instruction_set()]} code"


def _architectures(facts: dict) -> str:
    return f"for {facts.get('architectures', '?')}"


def _library(library: extension.Library, reason: str | None, contents: Callable[[dict], str]) -> str:
    if reason:
        return f"{library.kernels} kernels: not loaded: {reason}"
    facts = library.facts()
    return (
        f"{library.kernels} kernels: loaded; {contents(facts)}; built with {facts.get('compiler', '?')} against torch "
        f"{facts.get('torch', '?')}, stable ABI {facts.get('torch_target', '?')}"
    )


def _limits(op: str, name: str, reasons: dict[str, str | None]) -> str:
    """The calls that a backend takes and the backend of all others, if it does not take every call."""
    found = backend.OPS[op].get(name)
    if not found or not found.takes:
        return ""
    other = next(other for other, why in reasons.items() if why is None and other != name)
    return f" for {found.takes}; {other} for other calls"


def _choices(ops: list[str], device: str) -> list[str]:
    """The backend of each op on a device type, then each reason against another backend, once."""
    chosen, against = [], {}
    asked = backend.requested_backend()
    for op in ops:
        reasons = backend.backend_reasons(op, device)
        name = asked or next(name for name, why in reasons.items() if why is None)
        cannot = f": {reasons[asked]}" if asked and reasons.get(asked) else ""
        limits = _limits(op, name, reasons)
        why_it = f" as FLOWSEG_BACKEND asks{',' if limits and not cannot else ''}" if asked else ""
        chosen.append(f"  {op:20} {name}{why_it}{cannot or limits}")
        for name, why in reasons.items():
            if why:
                against.setdefault((name, why), []).append(op)
    common = max(map(len, against.values()), default=0)
    # Name the ops only if the reason does not hold for all ops of the backend.
    return chosen + [
        f"  not {name}: {why}" + (f" ({', '.join(found)})" if len(found) < common else "")
        for (name, why), found in against.items()
    ]


def _orders(ops: list[str]) -> list[str]:
    """The order in which ops try the GPU backends, with or without a GPU here. Ops with the same reason share a line."""
    by_reason: dict[tuple, list[str]] = {}
    for op in ops:
        order, because = backend.gpu_preference(op)
        if order:
            by_reason.setdefault((order, because), []).append(op)
    return [
        f"  {', '.join(found)}: {' before '.join(order)}; {because}" for (order, because), found in by_reason.items()
    ]


def report() -> str:
    """Return the text that the command prints."""
    lines = [
        f"flowseg-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU threads: {torch.get_num_threads()}; CUDA: {torch.version.cuda or 'not in this torch'}",
    ]
    lines.append(_library(extension.CPU, extension.why_no_cpu_kernels(), _instruction_set))
    lines.append(_library(extension.CUDA, extension.why_no_cuda_kernels(), _architectures))
    lines.append(f"Triton kernels: {why_no_triton('cuda') or 'ready for CUDA tensors'}")
    # Leave out FLOWSEG_NOTICE: printing the notice about missing kernels sets it.
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("FLOWSEG_") and k != "FLOWSEG_NOTICE"}
    lines.append(
        "Settings: " + (", ".join(f"{k}={v}" for k, v in variables.items()) or "none (FLOWSEG_* in the environment)")
    )
    ops = [op for op in sorted(backend.OPS) if not op.endswith("_bwd")]
    for device in ["cpu"] + (["cuda"] if torch.version.cuda else []):
        lines += ["", f"On {device} tensors:", *_choices(ops, device)]
    lines += ["", "Order on a GPU, and why:", *_orders(ops)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
