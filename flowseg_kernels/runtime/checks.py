"""Argument checks. They are cheap and traceable, as they read shapes, dtypes and devices only, and equal on every backend.

The checks named `..._values` read values; ops call them when they run.
"""

from __future__ import annotations

import operator
from math import inf

import torch
from torch import Tensor

from .transforms import under_transform

__all__ = [
    "FLOAT_DTYPES",
    "LABEL_DTYPES",
    "check_choice",
    "check_code_values",
    "check_device",
    "check_image",
    "check_index",
    "check_label_dtype",
    "check_label_values",
    "check_labels",
    "check_numbers",
    "check_positive",
    "check_tensor",
    "check_time",
    "check_time_values",
    "compute_dtype",
    "pack",
    "unpack",
    "valid_mask",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(name: str, value, dtypes, shape: str, ndim: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor {shape}; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: wanted a dense tensor {shape}; got layout {_names([value.layout])}; call .to_dense()")
    if value.dtype not in dtypes:
        # NumPy reads label maps of 16 bits as uint16.
        hint = "; call .int()" if value.dtype is torch.uint16 and torch.int32 in dtypes else ""
        raise TypeError(f"{name}: wanted dtype {_names(dtypes)}; got {_names([value.dtype])}{hint}")
    if value.ndim != ndim:
        raise ValueError(f"{name}: wanted shape {shape}; got {tuple(value.shape)}")


def check_image(name: str, value, like: tuple[str, Tensor] | None = None) -> None:
    """Check that `value` is (B, C, H, W) and floating; with `like` also that shape and device are the same."""
    check_tensor(name, value, FLOAT_DTYPES, "(B, C, H, W)", 4)
    if like is not None:
        if value.shape != like[1].shape:
            raise ValueError(f"{name}: wanted the shape of {like[0]}, {tuple(like[1].shape)}; got {tuple(value.shape)}")
        check_device(name, value, like)


def check_labels(name: str, value, like: tuple[str, Tensor]) -> None:
    """Check that `value` is (B, H, W), of an integer dtype, and matches the image `like` in size and device."""
    check_tensor(name, value, LABEL_DTYPES, "(B, H, W)", 3)
    image = like[1]
    if value.shape[0] != image.shape[0] or value.shape[1:] != image.shape[2:]:
        wanted = (image.shape[0], *image.shape[2:])
        raise ValueError(
            f"{name}: wanted shape {wanted} to match {like[0]} {tuple(image.shape)}; got {tuple(value.shape)}"
        )
    check_device(name, value, like)


def check_time(name: str, value, like: tuple[str, Tensor]) -> None:
    """Check that `value` is (B,) and floating, with one time per image of `like`."""
    check_tensor(name, value, FLOAT_DTYPES, "(B,)", 1)
    if value.shape[0] != like[1].shape[0]:
        raise ValueError(
            f"{name}: wanted shape ({like[1].shape[0]},), one time for each image of {like[0]}; got {tuple(value.shape)}"
        )
    check_device(name, value, like)


def check_device(name: str, value: Tensor, like: tuple[str, Tensor]) -> None:
    if value.device != like[1].device:
        raise ValueError(f"{name}: wanted it on {like[1].device}, where {like[0]} is; got {value.device}")


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(repr(c) for c in choices)}; got {value!r}")


def check_label_dtype(name: str, value) -> None:
    if value not in LABEL_DTYPES:
        raise TypeError(f"{name}: wanted uint8, int16, int32 or int64; got {value}")


def check_index(name: str, value) -> int:
    """Return `value` as an int; it may be an int of Python or NumPy."""
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(type(value), "__index__")):
        raise TypeError(f"{name}: wanted an int; got {type(value).__name__}")
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted an int; got a tensor; call .item()")
    return value if isinstance(value, int) else operator.index(value)


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    if not (value >= 0 if zero else value > 0) or value == float("inf"):
        raise ValueError(f"{name}: wanted a finite number {'of at least' if zero else 'above'} 0; got {value}")


def check_time_values(t: Tensor) -> None:
    """Check on the CPU that times are in [0, 1] up to rounding. Other devices are not checked, as reading values waits for them."""
    if t.device.type != "cpu" or t.numel() == 0:
        return
    rounding = 2 * torch.finfo(t.dtype).eps
    bad = ~((t >= -rounding) & (t <= 1 + rounding))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"t: wanted times in [0, 1]; got {float(t[first]):g} for image {first}")


def check_code_values(centroids: Tensor) -> None:
    """Check on the CPU that centroids are finite. Other devices are not checked, as reading values waits for them."""
    if centroids.device.type == "cpu" and not bool(torch.isfinite(centroids).all()):
        raise ValueError("centroids: wanted finite values; got NaN or infinity")


def check_label_values(name: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Check on the CPU that each label is in [0, K) or ignore_index. Other devices are not checked: reading values waits for them.

    Raises:
        ValueError: names the value and its place.
    """
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name}: wanted values in [0, {num_classes}) or ignore_index {ignore_index}; got {int(labels[place])} at "
            f"(image, row, column) {place}"
        )


# Numbers of a call: Python numbers, or tensors of one element for schedules.
#
# Changing Python numbers reach the op as a tensor too in compiled code. torch.compile turns a float that changes between
# calls into a symbolic float, and a symbolic float that reaches an op keeps the value of the first call in some graphs
# (pytorch/pytorch#197889). A tensor has the right value and causes no recompilation.

#: The defaults in the signatures of distance_correction, flow_loss and FlowLoss. A compiled graph holds a number as a constant if
#: the number equals its default, else as a tensor. A number may be None only if None is its default.
_DEFAULTS = {"correction_weight": 1.0, "temperature": 1.0, "eps": None, "max_norm": None, "t_min": 0.05}


def pack(**values: float | Tensor | None) -> tuple[list[float | None], Tensor | None]:
    """Convert numbers of a call, by name, to op arguments: floats, and None or a tensor of the numbers that replaces the floats.

    Raises:
        TypeError, ValueError: naming the argument that is no number, is out of range or requires grad.
    """
    if not torch.compiler.is_compiling():
        plain = _plain(values)
        if plain is not None:
            return plain, None
    for name, value in values.items():
        _check_number(name, value)
    if torch.compiler.is_compiling():
        deferred = any(isinstance(v, Tensor) or v != _DEFAULTS[name] for name, v in values.items() if v is not None)
    else:
        deferred = any(_is_abstract(v) for v in values.values())
    if deferred:
        present = [1.0 if v is None else v for v in values.values()]
        # Multiply: dynamo keeps a symbolic float symbolic only in products and sums.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        numbers = torch.stack([v.to("cpu", torch.float64) if isinstance(v, Tensor) else one * v for v in present])
        return [None if v is None else 1.0 for v in values.values()], numbers
    floats = [_as_float(name, v) for name, v in values.items()]
    _check_ranges(dict(zip(values, floats)))
    return floats, None


def check_numbers(**values: float | Tensor | None) -> None:
    """Check numbers of later calls: types, and the ranges of Python numbers. Tensors may change, so `unpack` checks their values.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, value in values.items():
        _check_number(name, value)
    _check_ranges({name: _as_float(name, v) for name, v in values.items() if not isinstance(v, Tensor)})


def _plain(values: dict[str, object]) -> list[float | None] | None:
    """The fast path of pack: the floats of a call with valid Python numbers, None for any other call."""
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
    """The numbers of a call when its op runs; `values` and `numbers` come from `pack`.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if numbers is None:
        return values
    found = [None if value is None else number for value, number in zip(values, numbers.tolist())]
    _check_ranges(dict(zip(names, found)))
    return found


def _as_float(name: str, value: object) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError:
        raise ValueError(f"{name}: wanted a finite number; got one beyond the range of float64") from None


def _check_ranges(values: dict[str, float | None]) -> None:
    """Check that all numbers are finite and above 0. The correction's weight may be 0."""
    for name, value in values.items():
        if value is not None:
            check_positive(name, value, zero=name == "correction_weight")


def _check_number(name: str, value: object) -> None:
    """Check the type of a number: a Python or NumPy number, a floating tensor of shape (), or None if that is the default."""
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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of distances and sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def valid_mask(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Split labels (B, H, W) into (valid (B, H, W) bool, class (B, H, W) int64). The class of an invalid pixel is 0.

    Raises ValueError for CPU labels outside [0, K) that are not ignore_index; on other devices such pixels count as ignored.
    """
    labels = labels.long()
    check_label_values("labels", labels, num_classes, ignore_index)
    valid = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    return valid, torch.where(valid, labels, 0)
