"""The CUDA kernels on the CPU: tests/host_cuda built with ninja, and registered as the CPU side of torch.ops.flowseg_cuda.

Everything above the kernels is then the real thing: the public functions, autograd, the backend table.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import torch

from flowseg_kernels.ops.shared.formulas import compute_dtype

ROOT = pathlib.Path(__file__).resolve().parents[3]
SHIM = ROOT / "tests" / "host_cuda"
BUILD = ROOT / "build" / "emulated"
OPS = ("flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion")


def why_not() -> str | None:
    """What is missing to run CUDA kernels on the CPU, or None."""
    if not shutil.which("g++"):
        return "g++ was not found: the CUDA kernels cannot be compiled for the CPU"
    for module in ("pybind11", "ninja"):
        if not importlib.util.find_spec(module):
            return f"{module} is not installed: the CUDA kernels cannot be compiled for the CPU"
    return None


def ninja(name: str, flags: str, sources: list[pathlib.Path], target: str, link: str) -> pathlib.Path:
    """Compile and link `sources` in build/emulated/`name`; returns the path of `target`."""
    import ninja as ninja_module

    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule compile",
        f"  command = g++ -std=c++20 -pthread {flags} -Wall -Wextra -Werror -Wno-unknown-pragmas -I'{ROOT}/csrc' "
        f"-I'{SHIM}' -include cuda_on_cpu.h -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -pthread {link} $in -o $out",
    ]
    escape = lambda path: str(path).replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    lines += [f"build {source.stem}.o: compile {escape(source)}" for source in sources]
    lines += [f"build {target}: link {' '.join(f'{source.stem}.o' for source in sources)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    program = pathlib.Path(ninja_module.BIN_DIR) / "ninja"
    done = subprocess.run([program, "-C", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return folder / target


def sources(*more: str) -> list[pathlib.Path]:
    return [SHIM / f"{name}.cpp" for name in (*OPS, *more)]


@functools.cache
def module():
    """The kernels as a Python module. No optimisation: compiling takes longer than running.

    FLOWSEG_EMULATED_SANITIZER in the environment ("address") compiles them with it.
    """
    import pybind11

    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_path('include')}'"
    sanitizer = os.environ.get("FLOWSEG_EMULATED_SANITIZER", "")
    flag = f"-g1 -fsanitize={sanitizer}" if sanitizer else ""
    name = f"module-{sanitizer}" if sanitizer else "module"
    path = ninja(name, f"-O0 -fPIC {flag} {includes}", sources("module"), "flowseg_emulated.so", f"-shared {flag}")
    spec = importlib.util.spec_from_file_location("flowseg_emulated", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["flowseg_emulated"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _array(t: torch.Tensor | None):
    if t is None:
        return None
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).detach().numpy()


def _call(name: str, *arguments):
    getattr(module(), name)(*(_array(a) if isinstance(a, torch.Tensor) else a for a in arguments))


def _poisoned(shape, dtype):
    """A result before it is written: what a kernel leaves out shows."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def flow_interpolate(source, labels, t, centroids, ignore_index):
    out = _poisoned(source.shape, source.dtype)
    _call("flow_interpolate", source, labels, t, centroids, ignore_index, out)
    return out


def flow_interpolate_bwd(grad, source, labels, t, centroids, ignore_index, need_t):
    grad_source = _poisoned(source.shape, source.dtype)
    grad_time = _poisoned(t.shape if need_t else (0,), t.dtype)
    _call("flow_interpolate_bwd", grad, source, labels, t, centroids, ignore_index, grad_source, grad_time)
    return grad_source, grad_time


def distance_correction(xhat, labels, centroids, *options):
    out = _poisoned(xhat.shape, xhat.dtype)
    _call("distance_correction", xhat, labels, centroids, *options, out)
    return out


def flow_loss(
    prediction, source, labels, t, centroids, predicts, loss_space, weight, schedule, temperature, eps, transform,
    max_norm, ignore_index, reduction, t_min, need_grad,
):  # fmt: skip
    loss = _poisoned(labels.shape if reduction == 2 else (), compute_dtype(prediction.dtype))
    residual = _poisoned(prediction.shape if need_grad else (0,), prediction.dtype)
    count = _poisoned((), torch.int64)
    _call(
        "flow_loss", prediction, source, labels, t, centroids, predicts == 1, loss_space == 1, weight, schedule == 1,
        temperature, eps, transform, max_norm, ignore_index, reduction, t_min, loss, residual, count,
    )  # fmt: skip
    return loss, residual, count


def flow_loss_bwd(grad_loss, residual, count, reduction):
    out = _poisoned(residual.shape, residual.dtype)
    _call("flow_loss_bwd", grad_loss.to(compute_dtype(residual.dtype)), residual, count, reduction, out)
    return out


def flow_loss_bwd_(grad_loss, residual, count, reduction):
    _call("flow_loss_bwd", grad_loss.to(compute_dtype(residual.dtype)), residual, count, reduction, residual)


def nearest_centroid(x, centroids, cells, records, groups, low, scale, labels, distance, margin, ignore_index):
    # Bare views may start anywhere; torch_arguments.h leaves the grid to codes in whole vectors.
    assert centroids.data_ptr() % 16 == 0
    _call("nearest_centroid", x, centroids, cells, records, groups, low, scale, labels, distance, margin, ignore_index)


def decode_confusion(x, target, centroids, cells, records, groups, low, scale, ignore_index):
    counts = torch.zeros(centroids.shape[0], centroids.shape[0], dtype=torch.int64)
    if x.numel() == 0:  # as the launcher has it
        return counts
    _call("decode_confusion", x, target, centroids, cells, records, groups, low, scale, ignore_index, counts)
    return counts


@functools.cache
def library() -> torch.library.Library:
    """Registers the functions above for CPU tensors, for as long as the process lives."""
    registered = torch.library.Library("flowseg_cuda", "IMPL")
    for name in (*OPS, "flow_interpolate_bwd", "flow_loss_bwd", "flow_loss_bwd_"):
        registered.impl(name, globals()[name], "CPU")
    return registered
