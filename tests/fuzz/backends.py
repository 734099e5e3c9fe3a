"""Make a backend accept CPU tensors in this process: Triton kernels are interpreted, CUDA kernels run on the host shim."""

from __future__ import annotations

import dataclasses
import os


def prepare(name: str) -> None:
    """Must be called before flowseg_kernels is imported, because Triton reads its environment at import."""
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
        from ..gpu_arithmetic import convert_bf16_as_gpus_do
        from ..quick_interpreter import speed_up

        speed_up()
        convert_bf16_as_gpus_do()
