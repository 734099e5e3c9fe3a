"""Lets a backend take CPU tensors in this process: Triton's kernels interpreted, the CUDA kernels on the host shim."""

from __future__ import annotations

import dataclasses
import os


def prepare(name: str) -> None:
    """Call it before flowseg_kernels is imported: Triton reads its environment then."""
    if name == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    from flowseg_kernels.runtime import backend

    from ..native import use_named_library

    if name == "cpu":
        use_named_library()
    if name == "cuda":
        from ..flowseg_kernels.cuda import emulated

        reason = emulated.why_not()
        if reason:
            raise SystemExit(reason)
        emulated.module()
        emulated.library()
        for implementations in backend.OPS.values():
            if "cuda" in implementations:
                anywhere = lambda device, channels: None  # noqa: E731
                implementations["cuda"] = dataclasses.replace(implementations["cuda"], why_not=anywhere)
    if name == "triton":
        from ..support.gpu_arithmetic import convert_bf16_as_gpus_do
        from ..support.interpreter import speed_up

        speed_up()
        convert_bf16_as_gpus_do()
