"""Lets a backend take CPU tensors in this process: Triton's kernels interpreted, the CUDA kernels on the host shim."""

from __future__ import annotations

import dataclasses
import os


def prepare(name: str) -> None:
    """Call it before flowseg_kernels is imported: Triton reads its environment then."""
    if name == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    from flowseg_kernels.runtime import backend

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
        quick_reduction()


def quick_reduction() -> None:
    """The interpreter walks through a reduction with a function of our own number by number; numpy has this one."""
    import numpy
    from triton.runtime import interpreter

    from flowseg_kernels.ops.distance_correction import triton_kernels

    either = getattr(triton_kernels, "_either", None)
    slow = interpreter.ReduceOps.generic_reduce
    if either is None or hasattr(slow, "quick"):
        return

    def generic_reduce(self, inputs):
        if self.combine_fn is not either or len(inputs) != 1:
            return slow(self, inputs)
        data = numpy.bitwise_or.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, inputs[0].dtype)]

    generic_reduce.quick = True
    interpreter.ReduceOps.generic_reduce = generic_reduce
