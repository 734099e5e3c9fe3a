"""Argument checks that look at shapes, dtypes and devices only: cheap, traceable, and the same on every backend."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

__all__ = [
    "FLOAT_DTYPES",
    "LABEL_DTYPES",
    "check_choice",
    "check_code_values",
    "check_device",
    "check_image",
    "check_index",
    "check_label_values",
    "check_labels",
    "check_positive",
    "check_tensor",
    "check_time",
    "check_time_values",
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
        raise TypeError(f"{name}: wanted dtype {_names(dtypes)}; got {_names([value.dtype])}")
    if value.ndim != ndim:
        raise ValueError(f"{name}: wanted shape {shape}; got {tuple(value.shape)}")


def check_image(name: str, value, channels: int | None = None, like: tuple[str, Tensor] | None = None) -> None:
    """`value` is (B, C, H, W), floating; with `like`, of the same shape and on the same device."""
    check_tensor(name, value, FLOAT_DTYPES, "(B, C, H, W)", 4)
    if channels is not None and value.shape[1] != channels:
        raise ValueError(f"{name}: wanted {channels} channels, as the centroids have; got shape {tuple(value.shape)}")
    if like is not None:
        if value.shape != like[1].shape:
            raise ValueError(f"{name}: wanted the shape of {like[0]}, {tuple(like[1].shape)}; got {tuple(value.shape)}")
        check_device(name, value, like)


def check_labels(name: str, value, like: tuple[str, Tensor]) -> None:
    """`value` is (B, H, W) of an integer dtype, for the image `like`, on its device."""
    check_tensor(name, value, LABEL_DTYPES, "(B, H, W)", 3)
    image = like[1]
    if value.shape[0] != image.shape[0] or value.shape[1:] != image.shape[2:]:
        wanted = (image.shape[0], *image.shape[2:])
        raise ValueError(
            f"{name}: wanted shape {wanted} to match {like[0]} {tuple(image.shape)}; got {tuple(value.shape)}"
        )
    check_device(name, value, like)


def check_time(name: str, value, like: tuple[str, Tensor]) -> None:
    """`value` is (B,), floating, one time in [0, 1] for each image of `like`."""
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


def check_index(name: str, value) -> int:
    """The whole number that `value` is: an int, or one of NumPy's."""
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(type(value), "__index__")):
        raise TypeError(f"{name}: wanted an int; got {type(value).__name__}")
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted an int; got a tensor; call .item()")
    return value if isinstance(value, int) else operator.index(value)


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    if not (value >= 0 if zero else value > 0) or value == float("inf"):
        raise ValueError(f"{name}: wanted a finite number {'of at least' if zero else 'above'} 0; got {value}")


def check_time_values(t: Tensor) -> None:
    """On the CPU a time outside [0, 1] by more than rounding is an error; elsewhere a look would wait for the device."""
    if t.device.type != "cpu" or t.numel() == 0:
        return
    rounding = 2 * torch.finfo(t.dtype).eps
    bad = ~((t >= -rounding) & (t <= 1 + rounding))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"t: wanted times in [0, 1]; got {float(t[first]):g} for image {first}")


def check_code_values(centroids: Tensor) -> None:
    """On the CPU a centroid that is not finite is an error; elsewhere a look would wait for the device."""
    if centroids.device.type == "cpu" and not bool(torch.isfinite(centroids).all()):
        raise ValueError("centroids: wanted finite values; got NaN or infinity")


def check_label_values(name: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """On the CPU a label outside [0, K) that is not ignore_index is an error; elsewhere a look would wait for the device.

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
