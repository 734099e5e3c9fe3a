"""`python -m flowseg_kernels.info`: versions, what was built, and the backend each op will use here and why."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable

import torch

from . import __version__
from .runtime import backend, extension
from .runtime.preferences import gpu_preference
from .runtime.triton_forms import why_no_triton

__all__ = ["report"]


def _instruction_set(facts: dict) -> str:
    return f"running {('baseline', 'AVX2', 'AVX-512')[torch.ops.flowseg_cpu.instruction_set()]} code"


def _architectures(facts: dict) -> str:
    return f"for {facts.get('architectures', '?')}"


def _library(library: extension.Library, reason: str | None, holds: Callable[[dict], str]) -> str:
    if reason:
        return f"{library.kernels} kernels: not loaded: {reason}"
    facts = library.facts()
    return (
        f"{library.kernels} kernels: loaded; {holds(facts)}; built with {facts.get('compiler', '?')} against torch "
        f"{facts.get('torch', '?')}, stable ABI {facts.get('torch_target', '?')}"
    )


def report() -> str:
    """The text that the command prints."""
    lines = [
        f"flowseg-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU threads: {torch.get_num_threads()}; CUDA: {torch.version.cuda or 'not in this torch'}",
    ]
    lines.append(_library(extension.CPU, extension.why_no_cpu_kernels(), _instruction_set))
    lines.append(_library(extension.CUDA, extension.why_no_cuda_kernels(), _architectures))
    lines.append(f"Triton kernels: {why_no_triton('cuda') or 'ready for CUDA tensors'}")
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("FLOWSEG_")}
    lines.append(
        "Settings: " + (", ".join(f"{k}={v}" for k, v in variables.items()) or "none (FLOWSEG_* in the environment)")
    )
    devices = ["cpu"] + (["cuda"] if torch.version.cuda else [])
    for device in devices:
        lines.append(f"\nOn {device} tensors:")
        for op in sorted(backend.OPS):
            if op.endswith("_bwd"):
                continue
            reasons = backend.backend_reasons(op, device)
            chosen = next(name for name, why in reasons.items() if why is None)
            missing = [name for name, why in reasons.items() if why == backend.NO_KERNEL]
            others = [f"{name}: {why}" for name, why in reasons.items() if why and name not in missing]
            others += [f"no {' or '.join(missing)} kernel in this version"] if missing else []
            order, because = gpu_preference(op) if device == "cuda" else ((), "")
            others += [f"{' before '.join(order)}: {because}"] if order else []
            lines.append(f"  {op:20} {chosen:10} {'; '.join(others)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
