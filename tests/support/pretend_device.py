"""A pretended accelerator. Tensors on the device `pretend:0` compute on the CPU, and every wait of the host for them is an error.

The tensors are plain tensors of torch's PrivateUse1 backend. Their memory is host memory, their kernels are those of the CPU, so
the numbers are right, and autograd, optimisers and modules treat them as they treat CUDA tensors. `no_read_back` refuses whatever
would make the host wait for a GPU: reading a value, an op whose result's shape depends on values, and every copy between host and
device that is not from or to pinned memory without blocking. A host tensor of one number in arithmetic is fine: torch passes it
to a kernel as a number. The host code of the CUDA backend runs as on a GPU; below it the compiled CPU kernels replace those of
CUDA.

On a machine with a GPU the same tests run on it, with `torch.cuda.set_sync_debug_mode("error")`.

The pretended device has to be made before the first backward of the process, as autograd starts its threads only once, and it
changes torch for the whole process. So tests that use it run in a process of their own: `run_in_own_process`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import flowseg_kernels  # noqa: F401  fills the table of backends
from flowseg_kernels.runtime import backend
from flowseg_kernels.runtime.extension import why_no_cpu_kernels

__all__ = ["WAITS", "ReadBack", "allowed", "chosen_device", "no_read_back", "recorded", "run_in_own_process"]

NAME = "pretend"
ROOT = Path(__file__).parents[2]
#: The device of the tests, in the process that `run_in_own_process` starts.
CHOSEN = "NO_STALL_DEVICE"
#: A pattern for the message of a wait, on the pretended device or with torch.cuda.set_sync_debug_mode.
WAITS = "the host waits for the device|synchronizing CUDA operation"

#: Ops that wait for a GPU whatever their arguments are: they read a value, or values decide the shape of their result.
_WAITING = frozenset(
    (
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "bincount", "masked_select", "multinomial", "randperm",
        "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors",
        "embedding_renorm_",
    )
)  # fmt: skip
#: Ops that take indices, the last of whose index tensors may be masks.
_INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"))


class ReadBack(RuntimeError):
    """The host would wait for the device here."""


# Plain globals: backward runs in a thread of autograd, which has context variables of its own.
_forbidden = False
_reads: list[str] | None = None
_device: torch.device | None = None
#: Storage of a pretended tensor, by its address -> a weak reference to it, and the host storage with its values.
_memory: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
#: Pinned host memory by its address. It stays pinned, so that no other tensor gets the address.
_pinned: dict[int, torch.UntypedStorage] = {}
_libraries: list[torch.library.Library] = []
_SWEEP_EVERY = 4096
_made = 0


def _why_not(device: str) -> str | None:
    """None if the tests can run here on `device`, "pretend" or "cuda", else the reason."""
    if device == "cuda":
        return None if torch.cuda.is_available() else "no GPU here, which torch.cuda.set_sync_debug_mode needs"
    from torch.utils import backend_registration

    needed = ((backend_registration, "_setup_privateuseone_for_python_backend"), (torch.library.Library, "fallback"))
    missing = [name for place, name in needed if not hasattr(place, name)]
    if missing:
        return f"torch {torch.__version__} has no {missing[0]}, an experimental API that the pretended device needs"
    reason = why_no_cpu_kernels()
    return f"the pretended device needs the compiled CPU kernels: {reason}" if reason else None


def run_in_own_process(device: str, *files: str) -> None:
    """Run test files with pytest on `device` in a new process; fail with its output if a test fails or none runs.

    Skip the calling test if this machine cannot show it.
    """
    if reason := _why_not(device):
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=", *files]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, CHOSEN: device}, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(files)} failed on {device}:\n{done.stdout[-12000:]}\n{done.stderr[-2000:]}")


def chosen_device() -> torch.device:
    """The device of this process: a GPU, or the pretended one, which the first call makes."""
    return torch.device("cuda", 0) if os.environ[CHOSEN] == "cuda" else _pretended()


@contextlib.contextmanager
def _setting(forbidden: bool, reads: list[str] | None = None) -> Iterator[list[str] | None]:
    global _forbidden, _reads
    before = _forbidden, _reads
    _forbidden, _reads = forbidden, reads
    on_gpu = torch.cuda.is_initialized()
    mode = torch.cuda.get_sync_debug_mode() if on_gpu else None
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
    try:
        yield reads
    finally:
        _forbidden, _reads = before
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)


def no_read_back() -> contextlib.AbstractContextManager:
    """A block in which every wait for the device raises ReadBack; on a GPU it raises RuntimeError."""
    return _setting(True)


def allowed() -> contextlib.AbstractContextManager:
    """A block, also inside `no_read_back`, in which the host may wait for the device: to log, to save, to score."""
    return _setting(False)


def recorded() -> contextlib.AbstractContextManager[list[str]]:
    """A block in which waits for the pretended device are allowed; yields the list of their descriptions so far."""
    return _setting(True, [])


# ---- The device ----


class _Module:
    """The module `torch.pretend`, with all that torch and its tools ask of a device."""

    _is_in_bad_fork = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    device = contextlib.nullcontext


@functools.cache
def _pretended() -> torch.device:
    global _device
    # It also loads the compiled CPU kernels.
    if reason := _why_not(NAME):
        raise RuntimeError(reason)
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _device = torch.device(NAME, 0)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    _libraries.append(everything)
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _prefer_whole_ops()
    _autocast()
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.is_pinned = _is_pinned
    torch.UntypedStorage.clone = _clone_storage
    _use_cuda_host_code()
    return _device


def _prefer_whole_ops() -> None:
    """Run an op by its own CPU kernel where torch would otherwise compose it of smaller ops, as it does on an unknown device."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    composed = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
    both = [name for name in names if has_kernel(name, "CPU") and any(has_kernel(name, key) for key in composed)]
    for name in ("aten::convolution", "aten::convolution_backward", *both):
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, functools.partial(_run, op), "PrivateUse1")
    library.impl("_to_copy", _to_copy, "PrivateUse1")
    library.impl("set_.source_Storage_storage_offset", _set, "PrivateUse1")


def _autocast() -> None:
    """Cast the products as autocast does on CUDA."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast_and_call(op, *args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)

        def cast(value):
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    for name in ("linear", "matmul", "mm", "addmm", "bmm", "conv2d", "scaled_dot_product_attention"):
        library.impl(
            name, functools.partial(cast_and_call, getattr(torch.ops.aten, name).default), "AutocastPrivateUse1"
        )


def _use_cuda_host_code() -> None:
    """Let the automatic choice find the CUDA kernels on this device, and the Triton kernels for calls that those do not take."""
    for found in backend.OPS.values():
        found["cuda"] = dataclasses.replace(found["cuda"], why_not=lambda device, channels: None)
        if found["cuda"].takes:
            # The launches of these kernels are proven on the meta device, which has no values to read.
            run = functools.partial(_call, found["cpu"].run)
            found["triton"] = dataclasses.replace(found["triton"], run=run, why_not=lambda device, channels: None)


def _to_copy(tensor: Tensor, **options) -> Tensor:
    non_blocking = options.pop("non_blocking", False)
    target = options.get("device") or tensor.device
    if _forbidden and target.type != tensor.device.type:
        _check_copy(tensor if target.type == NAME else None, non_blocking)
    found = _call(torch.ops.aten._to_copy.default, tensor, **options)
    # The result of a copy to the host that does not block is pinned, as on CUDA.
    return _pin_memory(found) if non_blocking and target.type == "cpu" else found


def _pin_memory(tensor: Tensor, device: object = None) -> Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"wanted host memory to pin; got a tensor on {tensor.device}")
    if _is_pinned(tensor):
        return tensor
    copy = tensor.clone()
    _pinned[copy.untyped_storage().data_ptr()] = copy.untyped_storage()
    return copy


def _is_pinned(tensor: Tensor, device: object = None) -> bool:
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _pinned


# ---- Ops ----


def _run(op: torch._ops.OpOverload, *args, **kwargs):
    """Run an op on the host's copies of its tensors. Registered for all ops."""
    if _forbidden:
        _check(op, args, kwargs)
    name = op.name().split("::")[1].split(".")[0]
    if op.namespace == "flowseg_cuda":
        return _cuda_kernel(name, args)
    if name == "_copy_from":
        # torch has no kernel of this op for the CPU.
        return _call(lambda source, target, non_blocking=False: target.copy_(source), *args)
    return _call(op, *_numbers_as_tensors(op, args), **kwargs)


#: Ops that torch.ops calls with a number in place of a tensor.
_TAKE_NUMBERS = ("add", "sub", "mul", "div")


def _numbers_as_tensors(op: torch._ops.OpOverload, args: tuple) -> tuple:
    """The arguments of an op. A number in arithmetic reaches this file as a Python number, which torch.ops refuses for many ops."""
    if (
        not args
        or not isinstance(args[0], Tensor)
        or op._schema.name.removeprefix("aten::").rstrip("_") in _TAKE_NUMBERS
    ):
        return args
    return tuple(
        torch.tensor(value, dtype=torch.result_type(args[0], value), device="cpu")
        if isinstance(value, (int, float)) and isinstance(wanted.type, torch.TensorType)
        else value
        for value, wanted in zip(args, op._schema.arguments)
    )


def _cuda_kernel(name: str, args: tuple):
    if name == "flow_loss_bwd_":
        # Only CUDA has a kernel that scales in place.
        args[1].copy_(_call(torch.ops.flowseg_cpu.flow_loss_bwd.default, *args))
        return None
    if name in ("neural_field", "neural_field_bwd"):
        *args, both, residual = args
        needs = ([True] * 8,) if name.endswith("_bwd") else ()
        options = ("both" if both else "first", "residual" if residual else "plain")
        return _call(backend.OPS[name]["cpu"].run, *args, *options, *needs)
    return _call(getattr(torch.ops.flowseg_cpu, name).default, *args)


def _call(function: Callable, *args, **kwargs):
    """Call a function of host tensors with tensors of the device; its results are on the device."""
    pairs: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    asked = kwargs.get("device")
    stays = asked is None or asked.type == NAME

    def there(value):
        if isinstance(value, Tensor):
            if value.device.type != NAME:
                given.append(value)
                return value
            pairs.append((value, _host(value)))
            return pairs[-1][1]
        if isinstance(value, (list, tuple)):
            return type(value)(map(there, value))
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def back(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(back, value))
        if not isinstance(value, Tensor) or not stays or any(value is other for other in given):
            return value
        memory = value.untyped_storage()._cdata
        for device, host in pairs:
            if value is host:
                return device
        for device, host in pairs:
            if memory == host.untyped_storage()._cdata:
                return _wrap(value, device.untyped_storage())
        return _wrap(value, None)

    args, kwargs = there(args), {name: there(value) for name, value in kwargs.items()}
    before = [_layout(host) for _, host in pairs]
    result = function(*args, **kwargs)
    for (device, host), layout in zip(pairs, before):
        if _layout(host) != layout:
            _place(device, host, None)
    return back(result)


def _layout(tensor: Tensor) -> tuple:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _host(tensor: Tensor) -> Tensor:
    """The host's view of a tensor of the device."""
    _, storage = _memory[tensor.untyped_storage()._cdata]
    host = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return host.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _wrap(host: Tensor, storage: torch.UntypedStorage | None) -> Tensor:
    """A tensor of the device with the values of `host`, in a storage of the device, or in a new one."""
    tensor = torch._C._acc.create_empty_tensor([0], host.dtype)
    _place(tensor, host, storage)
    return tensor


# Metadata alone: torch's own function is right for any device.
_AS_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _set(tensor: Tensor, *layout) -> Tensor:
    return torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_AS_ON_CPU, tensor, *layout)


def _place(tensor: Tensor, host: Tensor, storage: torch.UntypedStorage | None) -> None:
    """Make `tensor` the device's view of `host`, in `storage` or in a new storage of the device."""
    storage = _storage(host.untyped_storage()) if storage is None else storage
    _set(tensor, storage, host.storage_offset(), list(host.shape), list(host.stride()))


def _storage(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """A new storage of the device over the memory of a host storage."""
    global _made
    storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), _device, memory.nbytes())
    _memory[storage._cdata] = StorageWeakRef(storage), memory
    _made += 1
    if _made % _SWEEP_EVERY == 0:
        for key in [key for key, (weak, _) in _memory.items() if weak.expired()]:
            del _memory[key]
    return storage


_clone_on_host = torch.UntypedStorage.clone


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy a storage, as copy.deepcopy of a tensor does."""
    if storage.device.type != NAME:
        return _clone_on_host(storage)
    return _storage(_clone_on_host(_memory[storage._cdata][1]))


# ---- What waits for a device ----


def _check(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
    name = op.name().split("::")[1].split(".")[0]
    if op.namespace != "aten":
        return
    if name == "_copy_from":
        source, target, *rest = args
        if source.device != target.device:
            _check_copy(source if source.device.type == "cpu" else target, rest[0] if rest else False)
        return
    if name in _WAITING:
        _refuse(f"{name} reads a value of the device")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _refuse("repeat_interleave without output_size reads the size of its result")
    if name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _refuse(f"{name} with a mask counts the mask's pixels on the device; use torch.where or masked_fill")
        if any(index.device.type == "cpu" for index in indices):
            _refuse(f"{name} copies its indices from the host")
    if _has_host_tensor((*args, *kwargs.values())):
        raise RuntimeError(f"{name}: expected all tensors on one device, but found both {NAME}:0 and cpu")


def _has_host_tensor(values: list | tuple) -> bool:
    return any(
        value.device.type == "cpu" and value.ndim > 0
        if isinstance(value, Tensor)
        else isinstance(value, (list, tuple)) and _has_host_tensor(value)
        for value in values
    )


def _check_copy(host: Tensor | None, non_blocking: bool) -> None:
    """Check a copy between the device and `host`; None is host memory that the copy itself allocates, as pinned memory."""
    if not non_blocking:
        _refuse("a copy between host and device without non_blocking=True")
    if host is not None and not _is_pinned(host):
        _refuse("a copy between the device and host memory that is not pinned")


def _refuse(what: str) -> None:
    message = f"the host waits for the device: {what}, at {_user_line()}"
    if _reads is None:
        raise ReadBack(message)
    _reads.append(message)


def _user_line() -> str:
    """The innermost line outside of torch and of this file, or the step of a backward that has none."""
    library = os.path.dirname(torch.__file__)
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((library, "<")):
            return f"{os.path.relpath(file, ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return f"the backward of {node.name()}" if node else "an unknown place"
