"""Which implementation of an op runs: asked for by name, or the first one that can."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from . import settings
from .preferences import gpu_preference

__all__ = ["BACKENDS", "BackendUnavailable", "Implementation", "available_backends", "requested_backend", "use_backend"]

#: Every backend name, in the order of the automatic choice where nothing was measured.
BACKENDS = ("cuda", "triton", "cpu", "reference")

# Interpreted Triton kernels take CPU tensors too, but are for looking for mistakes: they run when they are asked for.
_CPU_ORDER = ("cpu", "reference", "triton", "cuda")

#: The reason given for a backend that an op has no implementation for.
NO_KERNEL = "no such kernel in this version"

# Ops by name; each holds its implementations by backend name. Filled by runtime.registry.
OPS: dict[str, dict[str, Implementation]] = {}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this call here; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    run:      the function, called with the op's arguments.
    why_not:  (device type, code channels) -> None when it can run such a call here, else the reason.
    """

    run: Callable
    why_not: Callable[[str, int], str | None]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(sorted(BACKENDS))}; got {name!r}")
    return name


_requested: ContextVar[str] = ContextVar(
    "flowseg_backend", default=_checked(settings.DEFAULT_BACKEND) if settings.DEFAULT_BACKEND else ""
)


def requested_backend() -> str:
    """The backend asked for in this context, or "" when the choice is automatic."""
    return _requested.get()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every flowseg op inside the block on one backend.

    Args:
        name: "reference" (plain PyTorch), "cpu" (compiled C++), "triton" or "cuda".

    The backend is read when an op runs, and a forward op hands the name on to its backward, so that the backward of a
    loss computed inside the block uses the same backend wherever and whenever it runs. A function compiled with
    torch.compile reads the backend of its forward at run time and that of its backward when it is compiled.

    Raises:
        ValueError: for an unknown name.
        BackendUnavailable: at the call of an op that has no such backend here, with the reason.
    """
    token = _requested.set(_checked(name))
    try:
        yield
    finally:
        _requested.reset(token)


@contextlib.contextmanager
def automatic_backend() -> Iterator[None]:
    """Choose for each op inside the block, whatever was asked for outside: for ops that serve the library itself."""
    token = _requested.set("")
    try:
        yield
    finally:
        _requested.reset(token)


def select(op: str, device: str, channels: int, requested: str) -> Implementation:
    """The implementation of `op` for tensors on `device` with `channels` code channels."""
    implementations = OPS[op]
    if requested:
        if requested not in implementations:
            raise BackendUnavailable(
                f"{op}: backend {requested!r} was asked for, but this version has no {requested} kernel for it; "
                f"it has {', '.join(implementations)}"
            )
        reason = implementations[requested].why_not(device, channels)
        if reason:
            raise BackendUnavailable(f"{op}: backend {requested!r} was asked for and cannot run: {reason}")
        return implementations[requested]
    for name in _order(op, device):
        if name in implementations and implementations[name].why_not(device, channels) is None:
            return implementations[name]
    raise BackendUnavailable(
        f"{op}: no backend can run on device {device!r}"
    )  # pragma: no cover - reference always can


def _order(op: str, device: str) -> tuple[str, ...]:
    """Backend names in the order of the automatic choice."""
    if device == "cpu":
        return _CPU_ORDER
    preferred = gpu_preference(op)[0] if device == "cuda" else ()
    return (*preferred, *(name for name in BACKENDS if name not in preferred))


def backend_reasons(op: str, device: str, channels: int = 3) -> dict[str, str | None]:
    """For each backend None if it can run `op` on `device`, else the reason; in the order of the automatic choice."""
    if op not in OPS:
        raise ValueError(f"op: wanted one of {', '.join(sorted(OPS))}; got {op!r}")
    return {
        name: OPS[op][name].why_not(device, channels) if name in OPS[op] else NO_KERNEL for name in _order(op, device)
    }


def available_backends(op: str, device: str = "cpu") -> list[str]:
    """Names of the backends that can run `op` on tensors of a device type here, the automatic choice first.

    Args:
        op: name of an op, such as "flow_loss".
        device: device type, "cpu" or "cuda".
    """
    return [name for name, reason in backend_reasons(op, device).items() if reason is None]
