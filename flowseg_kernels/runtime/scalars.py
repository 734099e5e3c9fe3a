"""Numbers of a call: Python numbers, or tensors of one element for schedules.

Compiled code takes changing Python numbers as tensors too. torch.compile turns a float that changes between calls into a symbolic
one, and a symbolic float that reaches an op keeps the value of the first call in some graphs (pytorch/pytorch#197889). A tensor is
neither stale nor a reason to compile anew.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_positive
from .transforms import under_transform

__all__ = ["pack", "unpack"]

#: Values that a call has when it is given none. They are constants of a compiled graph.
_DEFAULTS = {"correction_weight": 1.0, "temperature": 1.0, "eps": None, "max_norm": None, "t_min": 0.05}


def pack(**values: float | Tensor | None) -> tuple[list[float | None], Tensor | None]:
    """Numbers of a call by name, as arguments of an op: floats, and None or a tensor of the same numbers that counts instead.

    Raises:
        TypeError, ValueError: naming the argument, for what is no number, out of range or wants a gradient.
    """
    if not torch.compiler.is_compiling():
        plain = _plain(values)
        if plain is not None:
            return plain, None
    for name, value in values.items():
        _check_kind(name, value)
    if torch.compiler.is_compiling():
        deferred = any(isinstance(v, Tensor) or v != _DEFAULTS[name] for name, v in values.items() if v is not None)
    else:
        deferred = any(_is_abstract(v) for v in values.values())
    if deferred:
        present = [1.0 if v is None else v for v in values.values()]
        # A product, as dynamo keeps only products and sums of a symbolic float symbolic.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        numbers = torch.stack([v.to("cpu", torch.float64) if isinstance(v, Tensor) else one * v for v in present])
        return [None if v is None else 1.0 for v in values.values()], numbers
    floats = [_as_float(name, v) for name, v in values.items()]
    check(dict(zip(values, floats)))
    return floats, None


def _plain(values: dict[str, object]) -> list[float | None] | None:
    """The numbers of a usual call, which must not take long; None for any other call."""
    found: list[float | None] = []
    for name, value in values.items():
        if value is None and _DEFAULTS[name] is None:
            found.append(None)
        elif type(value) is float and 0 < value < inf:
            found.append(value)
        elif type(value) in (float, int) and 0 <= value < 1e300 and (value or name == "correction_weight"):
            found.append(float(value))
        else:
            return None
    return found


def unpack(names: tuple[str, ...], values: list[float | None], numbers: Tensor | None) -> list[float | None]:
    """The numbers of a call where its op runs; `values` and `numbers` as `pack` gave them.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if numbers is None:
        return values
    found = [None if value is None else number for value, number in zip(values, numbers.tolist())]
    check(dict(zip(names, found)))
    return found


def _as_float(name: str, value: object) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError:
        raise ValueError(f"{name}: wanted a finite number; got one beyond the range of float64") from None


def check(values: dict[str, float | None]) -> None:
    """Numbers by name are finite and above 0; a correction's weight may be 0.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if value is not None:
            check_positive(name, value, zero=name == "correction_weight")


def _check_kind(name: str, value: object) -> None:
    optional = _DEFAULTS[name] is None
    if value is None and optional:
        return
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.ndim or value.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name}: wanted a number, or a floating tensor of shape (); got {tuple(value.shape)} of {value.dtype}"
            )
        if value.requires_grad:
            raise ValueError(
                f"{name}: wanted a number that needs no gradient, as no op is differentiable in it; got a tensor that requires "
                "grad; call .detach()"
            )
    elif not isinstance(value, (int, float)) and (
        not hasattr(value, "__float__")
        or getattr(value, "ndim", 0)
        or isinstance(value, complex)
        or "complex" in str(type(value))
    ):
        raise TypeError(f"{name}: wanted a number{' or None' if optional else ''}; got {type(value).__name__}")


def _is_abstract(value: object) -> bool:
    """Whether a number has no value yet: a tensor inside a transform or while a graph is recorded, or a symbolic float."""
    if isinstance(value, Tensor):
        return type(value) not in (Tensor, torch.nn.Parameter) or under_transform(value)
    return isinstance(value, (torch.SymFloat, torch.SymInt))
