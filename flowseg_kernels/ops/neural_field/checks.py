"""Argument checks of neural_field: shapes, dtypes and devices."""

from __future__ import annotations

from torch import Tensor

from ...runtime.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_image,
    check_index,
    check_positive,
    check_tensor,
)
from .reference import FORMS, NORMALISE

__all__ = ["checked_arguments"]


def checked_arguments(
    x: Tensor,
    weights: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    norm_weight: Tensor | None,
    out_norm_weight: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    patch_size: int,
    mlp_ratio: int,
    eps: float,
    normalise: str,
    form: str,
) -> tuple:
    """The arguments of the op: eight tensors, then the five options. The op gets an empty tensor for each norm that is None.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_image("x", x)
    check_tensor("weights", weights, FLOAT_DTYPES, "(B, N, L, 2 r Hx^2)", 4)
    check_device("weights", weights, ("x", x))
    check_tensor("embed_weight", embed_weight, FLOAT_DTYPES, "(Hx, C + F^2)", 2)
    check_tensor("embed_bias", embed_bias, FLOAT_DTYPES, "(Hx,)", 1)
    for name, value in (("patch_size", patch_size), ("mlp_ratio", mlp_ratio)):
        check_index(name, value)
        check_positive(name, value)
    check_choice("normalise", normalise, NORMALISE)
    check_choice("form", form, FORMS)
    hidden = embed_bias.shape[-1]
    _check_weights(weights, x, patch_size, mlp_ratio, hidden)
    channels = x.shape[1]
    features = embed_weight.shape[-1] - channels
    if features < 1 or int(features**0.5 + 0.5) ** 2 != features:
        raise ValueError(
            f"embed_weight: wanted shape (Hx, C + F^2) with C = {channels}; got {tuple(embed_weight.shape)}"
        )
    wanted = {
        "embed_weight": (embed_weight, "(Hx, C + F^2)", (hidden, channels + features)),
        "embed_bias": (embed_bias, "(Hx,)", (hidden,)),
        "out_weight": (out_weight, "(C, Hx)", (channels, hidden)),
        "out_bias": (out_bias, "(C,)", (channels,)),
    }
    norms = {
        "norm_weight": (norm_weight, "(L, Hx)", (weights.shape[2], hidden)),
        "out_norm_weight": (out_norm_weight, "(Hx,)", (hidden,)),
    }
    if form == "residual":
        wanted |= norms
    else:
        for name, (value, _, _) in norms.items():
            if value is not None:
                raise ValueError(f"{name}: wanted None, as the plain form has no RMSNorm; got {type(value).__name__}")
        norm_weight, out_norm_weight = x.new_empty(0), x.new_empty(0)
    for name, (value, dims, shape) in wanted.items():
        check_tensor(name, value, FLOAT_DTYPES, dims, len(shape))
        if value.shape != shape:
            raise ValueError(f"{name}: wanted shape {dims} = {shape}; got {tuple(value.shape)}")
        check_device(name, value, ("x", x))
    tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
    return (*tensors, patch_size, mlp_ratio, eps, normalise, form)


def _check_weights(weights: Tensor, x: Tensor, patch_size: int, mlp_ratio: int, hidden: int) -> None:
    batch, _, height, width = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"x: wanted height and width divisible by patch_size {patch_size}; got {tuple(x.shape)}")
    patches = (height // patch_size) * (width // patch_size)
    size = 2 * mlp_ratio * hidden * hidden
    if weights.shape[:2] != (batch, patches) or weights.shape[3] != size:
        raise ValueError(
            f"weights: wanted shape ({batch}, {patches}, L, {size}) for {patches} patches of {patch_size} x {patch_size} and "
            f"Hx {hidden}; got {tuple(weights.shape)}"
        )
