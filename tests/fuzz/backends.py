"""Make a backend accept CPU tensors in this process: Triton kernels are interpreted, CUDA kernels run on the host shim."""

from __future__ import annotations

import os


def prepare(name: str) -> None:
    """Must be called before flowseg_kernels is imported, because Triton reads its environment at import."""
    if name == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    from ..native import use_named_library

    if name == "cpu":
        use_named_library()
    if name == "cuda":
        from ..host_cuda import kernels

        reason = kernels.why_not()
        if reason:
            raise SystemExit(reason)
        kernels.install()
        kernels.library()
    if name == "triton":
        from ..support.gpu_arithmetic import convert_bf16_as_gpus_do
        from ..support.interpreter import speed_up

        speed_up()
        convert_bf16_as_gpus_do()
