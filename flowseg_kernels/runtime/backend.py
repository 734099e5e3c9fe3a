"""Which implementation of an op runs: the one the caller asked for by name, or the first one that can run the call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "Implementation",
    "available_backends",
    "gpu_preference",
    "requested_backend",
    "use_backend",
]

#: All backends, in the order in which ops without a measurement try them.
BACKENDS = ("cuda", "triton", "cpu", "reference")

# Interpreted Triton kernels also accept CPU tensors, but only for debugging: they are never chosen automatically.
_CPU_ORDER = ("cpu", "reference", "triton", "cuda")

#: Backend of the whole process, from the environment; empty: chosen per op. docs/environment.md lists all variables.
DEFAULT_BACKEND: str = os.environ.get("FLOWSEG_BACKEND", "").strip().lower()

#: Why an op cannot run on a backend that it has no implementation for.
NO_KERNEL = "no such kernel in this version"

#: Op name -> backend name -> implementation. runtime.registry fills the table.
OPS: dict[str, dict[str, Implementation]] = {}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this call here; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    run:      the function, called with the op's arguments.
    why_not:  (device type, code channels) -> None when it can run such a call here, else the reason.
    takes:    the calls that its kernels take, in words, if the function passes other calls on (`instead_of`); "" if they take all.
    """

    run: Callable
    why_not: Callable[[str, int], str | None]
    takes: str = ""


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(sorted(BACKENDS))}; got {name!r}")
    return name


_requested: ContextVar[str] = ContextVar(
    "flowseg_backend", default=_checked(DEFAULT_BACKEND) if DEFAULT_BACKEND else ""
)


def requested_backend() -> str:
    """The backend asked for in this context, or "" when the choice is automatic."""
    return _requested.get()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every flowseg op inside the block on one backend.

    Args:
        name: "reference" (plain PyTorch), "cpu" (compiled C++), "triton" or "cuda".

    An op reads the backend when it runs. A forward op passes the name to its backward: the backward of a loss computed inside
    the block uses the same backend, even if it runs later or in another thread. A function compiled with torch.compile reads
    the backend of its forward at run time and the backend of its backward at compile time.

    A call of neural_field that the backend's kernels do not take, because of its dtypes or its hidden width, runs on the next one.

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
    """Ignore the requested backend inside the block: for ops that the library calls for its own purposes."""
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
    return _first(op, device, channels)


def instead_of(name: str, op: str, device: str, channels: int) -> Implementation:
    """The implementation of a call of `op` that the kernels of backend `name` do not take: the automatic choice without them."""
    return _first(op, device, channels, without=name)


def _first(op: str, device: str, channels: int, without: str = "") -> Implementation:
    implementations = OPS[op]
    for name in _order(op, device):
        if name != without and name in implementations and implementations[name].why_not(device, channels) is None:
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


@functools.cache
def _stored_preferences() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("preferences.json").read_text())


def gpu_preference(op: str) -> tuple[tuple[str, ...], str]:
    """(backends in the order to try on a GPU, why) for an op. A backward op has the order of its forward op.

    `python -m bench preferences` writes the orders to preferences.json: from measured times, or from static instruction counts
    for an op that no GPU has measured.
    """
    found = _stored_preferences().get(op.removesuffix("_bwd"))
    return (tuple(found["order"]), found["because"]) if found else ((), "")


def backend_reasons(op: str, device: str, channels: int = 3) -> dict[str, str | None]:
    """Backend name -> None if it can run `op` on `device`, else the reason. Keys are in the order of the automatic choice."""
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
