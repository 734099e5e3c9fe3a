"""The CUDA kernels on the host: compiles tests/host_cuda and registers it as the CPU implementation of torch.ops.flowseg_cuda.

Everything above the kernels stays as it is: the public functions, autograd, the table of backends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess

import torch

from flowseg_kernels.runtime import backend
from flowseg_kernels.runtime.checks import compute_dtype

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
BUILD = ROOT / "build" / "host_cuda"


def why_not() -> str | None:
    """The reason why the kernels cannot be compiled here, or None."""
    return None if shutil.which("g++") else "g++ was not found: the CUDA kernels cannot be compiled for the host"


def compiled(name: str, *flags: str, sources: tuple[str, ...] = ("ops.cpp",)) -> pathlib.Path:
    """Compile sources of tests/host_cuda to build/host_cuda/`name`, unless it is newer than every source and header."""
    target = BUILD / name
    inputs = [*FOLDER.iterdir(), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    if not target.exists() or target.stat().st_mtime < max(file.stat().st_mtime for file in inputs if file.is_file()):
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-std=c++20", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
                   f"-I{ROOT}/csrc", "-include", FOLDER / "cuda_on_host.h", *flags, *(FOLDER / s for s in sources)]  # fmt: skip
        # Another process may load the file meanwhile: it sees the old one or the whole new one.
        written = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", written], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-5000:]
        written.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled ops. FLOWSEG_EMULATED_SANITIZER in the environment ("address") compiles them with that sanitizer."""
    sanitizer = os.environ.get("FLOWSEG_EMULATED_SANITIZER", "")
    flags = ["-g1", f"-fsanitize={sanitizer}"] if sanitizer else []
    name = f"libops-{sanitizer}.so" if sanitizer else "libops.so"
    found = ctypes.CDLL(compiled(name, "-O1", "-fPIC", "-shared", *flags))
    found.last_failure.restype = ctypes.c_char_p
    return found


def kernel_library(name: str) -> ctypes.CDLL:
    """The library of `name`.cpp, which launches one kernel by `name`_blocks(call). That returns what was wrong, or None."""
    flags = ["-O1", "-g1", "-fPIC", "-shared", "-DFLOWSEG_PLANTS"]
    found = ctypes.CDLL(compiled(f"lib{name}.so", *flags, sources=(f"{name}.cpp",)))
    getattr(found, f"{name}_blocks").restype = ctypes.c_char_p
    return found


class Array(ctypes.Structure):
    """`Array` of ops.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("itemsize", ctypes.c_int64),
        ("is_bfloat16", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    ]


def _argument(value):
    """A tensor, None (an absent tensor) or a number as C++ takes it."""
    if isinstance(value, torch.Tensor):
        shape, stride = (ctypes.c_int64 * 4)(*value.shape), (ctypes.c_int64 * 4)(*value.stride())
        is_bfloat16 = value.dtype == torch.bfloat16
        return ctypes.byref(Array(value.data_ptr(), value.element_size(), is_bfloat16, value.dim(), shape, stride))
    if value is None:
        return ctypes.byref(Array(None, 4, 0, 0))
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def call(name: str, *arguments) -> None:
    """Call a function of ops.h. The order of numbers and tensors is that of its declaration."""
    getattr(library(), name)(*map(_argument, arguments))
    failure = library().last_failure()
    if failure:
        raise RuntimeError(f"{name} on the host: {failure.decode()}")


def _poisoned(shape, dtype):
    """A result before it is written. Elements that a kernel does not write show as NaN or 77."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def flow_interpolate(source, labels, t, centroids, ignore_index):
    out = _poisoned(source.shape, source.dtype)
    call("flow_interpolate", source, labels, t, centroids, ignore_index, out)
    return out


def flow_interpolate_bwd(grad, source, labels, t, centroids, ignore_index, need_t):
    grad_source = _poisoned(source.shape, source.dtype)
    grad_time = _poisoned(t.shape if need_t else (0,), t.dtype)
    call("flow_interpolate_bwd", grad, source, labels, t, centroids, ignore_index, grad_source, grad_time)
    return grad_source, grad_time


def distance_correction(xhat, labels, centroids, *options):
    out = _poisoned(xhat.shape, xhat.dtype)
    call("distance_correction", xhat, labels, centroids, *options, out)
    return out


def flow_loss(prediction, source, labels, t, centroids, *options):
    *options, need_grad = options
    reduction = options[-2]
    loss = _poisoned(labels.shape if reduction == 2 else (), compute_dtype(prediction.dtype))
    residual = _poisoned(prediction.shape if need_grad else (0,), prediction.dtype)
    count = _poisoned((), torch.int64)
    call("flow_loss", prediction, source, labels, t, centroids, *options, loss, residual, count)
    return loss, residual, count


def flow_loss_bwd(grad_loss, residual, count, reduction):
    out = _poisoned(residual.shape, residual.dtype)
    call("flow_loss_bwd", grad_loss.to(compute_dtype(residual.dtype)), residual, count, reduction, out)
    return out


def flow_loss_bwd_(grad_loss, residual, count, reduction):
    call("flow_loss_bwd", grad_loss.to(compute_dtype(residual.dtype)), residual, count, reduction, residual)


def _five(tables):
    return *tables, *(None,) * (5 - len(tables))


def nearest_centroid(x, centroids, tables, low, scale, labels, distance, margin, ignore_index):
    call("nearest_centroid", x, centroids, *_five(tables), low, scale, labels, distance, margin, ignore_index)


def decode_confusion(x, target, centroids, tables, low, scale, by_class, ignore_index):
    counts = torch.zeros(3 if by_class else centroids.shape[0], centroids.shape[0], dtype=torch.int64)
    if x.numel():  # the CUDA launcher too returns zeros for an empty image
        call("decode_confusion", x, target, centroids, *_five(tables), low, scale, by_class, ignore_index, counts)
    return counts


def class_probabilities(x, centroids, *arguments):
    if x.numel():  # the CUDA launcher too has nothing to write for an empty image
        call("class_probabilities", x, centroids, *arguments)


def top_classes(x, centroids, *arguments):
    if x.numel():
        call("top_classes", x, centroids, *arguments)


def neural_field(x, *arguments):
    out = _poisoned(x.shape, x.dtype)
    call("neural_field", x, *arguments, out)
    return out


def neural_field_bwd(grad, *arguments):
    tensors, residual = arguments[:8], arguments[-1]
    found = [_poisoned(v.shape, v.dtype) for v in tensors]
    call("neural_field_bwd", grad, *arguments, *found)
    if not residual:
        found[4:6] = (torch.zeros_like(v) for v in tensors[4:6])  # the plain form has no gains
    return tuple(found)


OPS = (
    flow_interpolate,
    flow_interpolate_bwd,
    distance_correction,
    flow_loss,
    flow_loss_bwd,
    flow_loss_bwd_,
    nearest_centroid,
    decode_confusion,
    class_probabilities,
    top_classes,
    neural_field,
    neural_field_bwd,
)


_registered: list[torch.library.Library] = []
#: The "cuda" implementations that install() replaced, by op.
_replaced: dict[str, backend.Implementation] = {}


def installed() -> bool:
    """Whether the "cuda" backend runs on the host now."""
    return bool(_replaced)


def install() -> None:
    """Let the "cuda" backend accept CPU tensors and run them on the host, until uninstall()."""
    if installed():
        return
    if not _registered:
        _registered.append(torch.library.Library("flowseg_cuda", "IMPL"))
        for op in OPS:
            _registered[0].impl(op.__name__, op, "CPU")
    for name, implementations in backend.OPS.items():
        if "cuda" in implementations:
            _replaced[name] = implementations["cuda"]
            implementations["cuda"] = dataclasses.replace(_replaced[name], why_not=lambda device, channels: why_not())


def uninstall() -> None:
    """Give the "cuda" backend back to the GPU."""
    for name, implementation in _replaced.items():
        backend.OPS[name]["cuda"] = implementation
    _replaced.clear()
