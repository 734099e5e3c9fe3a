"""Gives interpreted Triton kernels the rounding errors of a GPU: NumPy rounds correctly, a GPU's fast instructions do not.

On NVIDIA GPUs Triton compiles fp32 `/` to div.full, exp to ex2.approx of the rounded product with log2(e), and sqrt to
sqrt.approx.ftz; logarithms come from libdevice. Each result is moved by the largest error that the PTX ISA or libdevice documents,
up for some values and down for others. So a test that passes does not rely on the interpreter's exact arithmetic. The
interpreter's own errors, in conversions of bf16, are corrected.
"""

import numpy as np

__all__ = ["convert_bf16_as_gpus_do", "install"]

_SMALLEST = np.finfo(np.float32).tiny


def _side(v):
    """Return -1, 0 or 1 per number, derived from its bits."""
    return (v.view(np.uint32) * np.uint32(2654435769) >> np.uint32(16)).astype(np.int32) % 3 - 1


def _moved(v, steps=0, relative=0.0):
    """Return v moved by `steps` ulp and by the relative error `relative`. Zeros, NaN and infinities stay."""
    v = np.asarray(v, np.float32)
    side = _side(v)
    away = (v.view(np.int32) + np.int32(steps) * side).view(np.float32)
    away = (away * (1.0 + relative * side.astype(np.float64))).astype(np.float32)
    return np.where(np.isfinite(v) & (np.abs(v) > 2 * _SMALLEST), away, v)


def _quotient(a, b):
    # The machine code scales the divisor by a power of two, takes its reciprocal (error 1 ulp) and multiplies. Divisors above 2^126
    # give 0.
    reciprocal = 1 / b
    found = np.where(np.isfinite(reciprocal), a * _moved(reciprocal, steps=1), a / b)
    return np.where(np.isfinite(a) & (np.abs(b) > 2.0**126), np.float32(0), found)


def _exp2(x):
    return np.where(x == 0, np.float32(1), _moved(np.exp2(x), relative=2.0**-22))


def _exp(x):
    return _exp2((x * np.float32(1.4426950408889634)).astype(np.float32))


def _root(x):
    return _moved(np.sqrt(np.where(np.abs(x) < _SMALLEST, np.float32(0), x)), relative=2.0**-23)


def _log(x):
    return _moved(np.log(x), steps=1)


def _log2(x):
    return _moved(np.log2(x), steps=1)


def convert_bf16_as_gpus_do():
    """Convert from bf16 exactly, and to bf16 by rounding to nearest. The interpreter loses subnormal numbers and truncates."""
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy()).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16).reshape(data.shape)
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def install():
    """Install these errors for the rest of the process."""
    from triton.runtime.interpreter import InterpreterBuilder

    convert_bf16_as_gpus_do()

    def on_fp32(inexact, exact):
        def compute(*arguments):
            return (inexact if all(v.dtype == np.float32 for v in arguments) else exact)(*arguments)

        return compute

    for name, inexact, exact in (
        ("exp", _exp, np.exp),
        ("exp2", _exp2, np.exp2),
        ("log", _log, np.log),
        ("log2", _log2, np.log2),
        ("sqrt", _root, np.sqrt),
    ):
        op = on_fp32(inexact, exact)
        getattr(
            InterpreterBuilder, f"create_{name}"
        )  # fails if Triton has renamed the method, which would then stay exact
        setattr(InterpreterBuilder, f"create_{name}", lambda self, arg, op=op: self.unary_op(arg, op))
    divide = on_fp32(_quotient, np.divide)
    InterpreterBuilder.create_fdiv = lambda self, a, b: self.binary_op(a, b, divide)
