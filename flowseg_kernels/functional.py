"""The public functions: they check arguments, fill in defaults, and each calls one registered op.

Shapes: B images, C code channels, H x W pixels, K classes. Images are (B, C, H, W) in fp32, bf16, fp16 or fp64 with any
strides; labels are (B, H, W) of uint8, int16, int32 or int64. Distances, sums and losses are computed in fp32 (fp64 for fp64
inputs) whatever the dtype of the images. Formulas: arXiv 2603.19218; the derivations are in docs/ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops  # noqa: F401  registers torch.ops.flowseg
from .codes import Codebook
from .derived import derived_from, ignored_label
from .ops.distance_correction.reference import TRANSFORMS
from .ops.flow_loss.reference import REDUCTIONS, SCHEDULES, SPACES
from .ops.neural_field.checks import checked_arguments
from .ops.neural_field.reference import neural_field as _plain_neural_field
from .ops.shared.formulas import compute_dtype, valid_mask
from .ops.shared.formulas import encode_labels as _encode_valid
from .runtime.checks import (
    FLOAT_DTYPES,
    LABEL_DTYPES,
    check_choice,
    check_code_values,
    check_device,
    check_image,
    check_index,
    check_labels,
    check_tensor,
    check_time,
)
from .runtime.scalars import pack
from .runtime.transforms import call, call_op, check_no_forward_mode, under_transform

__all__ = [
    "decode_confusion",
    "distance_correction",
    "encode_labels",
    "flow_interpolate",
    "flow_loss",
    "nearest_centroid",
    "neural_field",
]

#: Ignored label of bare centroids, and the most of them for which it is none of their classes.
_IGNORE_INDEX = 255


def _checked_codes(centroids: Tensor | Codebook, like: tuple[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """(K, C) centroids on the device of the tensor `like`, and the ignored label of a codebook."""
    mu, ignored = centroids() if isinstance(centroids, Codebook) else (centroids, None)
    check_tensor(name, mu, FLOAT_DTYPES, "(K, C), or a Codebook", 2)
    if mu.shape[0] < 1:
        raise ValueError(f"{name}: wanted at least one centroid; got shape {tuple(mu.shape)}")
    if mu.requires_grad:
        raise ValueError(
            f"{name}: wanted fixed codes, no op is differentiable in them; got a tensor that requires grad"
        )
    check_device(name, mu, like)
    return mu, ignored


def _codes(
    centroids: Tensor | Codebook, like: tuple[str, Tensor], name: str = "centroids"
) -> tuple[Tensor, Tensor | None]:
    """Centroids in the compute dtype of the image `like`, and the ignored label of a codebook."""
    mu, ignored = _checked_codes(centroids, like, name)
    dtype = compute_dtype(like[1].dtype)
    if mu.dtype != dtype and ignored is not None and mu.device.type != "cpu" and not torch.compiler.is_compiling():
        # The same tensor at each call: the values of a new one would be read back, which waits for the device.
        mu = derived_from(mu).codes_on(mu.device, dtype)
    return mu.to(dtype).contiguous(), ignored


def _label(ignore_index: int | None, ignored: Tensor | None, classes: int) -> tuple[Tensor | None, int]:
    """The ignored label as ops take it: a codebook's, read when the op runs, or a number."""
    if ignore_index is not None:
        return None, check_index("ignore_index", ignore_index)
    if ignored is None and classes > _IGNORE_INDEX:
        raise ValueError(
            f"ignore_index: wanted a number, as the default {_IGNORE_INDEX} is one of these {classes} classes; got "
            "None. Give one such as -1, or a Codebook, which holds its own"
        )
    return ignored, _IGNORE_INDEX


def _check_eps(eps: object, centroids: Tensor | Codebook) -> None:
    if eps is None and not isinstance(centroids, Codebook):
        raise ValueError(
            "eps: wanted a number above 0 for bare centroids, about 0.2 * (smallest code distance)**2; got None. "
            "A Codebook in place of the centroids sets it by itself"
        )


def encode_labels(labels: Tensor, codebook: Tensor | Codebook, *, ignore_index: int | None = None) -> Tensor:
    """The code of each label: mu[labels], 0 where ignored.

    Args:
        labels: (B, H, W), uint8, int16, int32 or int64.
        codebook: a Codebook, or (K, C) centroids.
        ignore_index: default the codebook's, 255 for bare centroids.

    Returns:
        (B, C, H, W), fp32 or fp64 as the centroids are.

    Raises:
        ValueError: for a CPU label outside [0, K) that is not ignore_index.
    """
    check_tensor("labels", labels, LABEL_DTYPES, "(B, H, W)", 3)
    mu, ignored = _checked_codes(codebook, ("labels", labels), "codebook")
    mu = mu.to(compute_dtype(mu.dtype))
    check_code_values(mu)
    ignored, number = _label(ignore_index, ignored, mu.shape[0])
    if ignored is not None:
        # A compiled graph keeps the tensor, whose value may change.
        number = ignored if torch.compiler.is_compiling() else ignored_label(ignored)
    valid, classes = valid_mask(labels, mu.shape[0], number)
    return torch.where(valid[:, None], _encode_valid(classes, mu), 0).contiguous()


def flow_interpolate(
    source: Tensor, labels: Tensor, t: Tensor, centroids: Tensor | Codebook, *, ignore_index: int | None = None
) -> Tensor:
    """The point of the straight path at time t: x_t = (1 - t) x0 + t mu_y.

    Args:
        source: x0, (B, C, H, W).
        labels: y, (B, H, W).
        t: (B,), times in [0, 1], on the CPU checked to within their rounding.
        centroids: (K, C), or a Codebook.
        ignore_index: label of pixels without a class; default the codebook's, 255 for bare centroids. They stay at x0.

    Returns:
        x_t, (B, C, H, W) in the dtype of source, contiguous.

    Differentiable in source and t, once, with torch.func.grad, vjp and vmap too; a second derivative and forward mode raise
    NotImplementedError.
    Cost: reads source and labels once, writes x_t once.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came; on the CPU also for a label outside
            [0, K) that is not ignore_index (on other devices such a pixel counts as ignored).
    """
    check_image("source", source)
    check_labels("labels", labels, ("source", source))
    check_time("t", t, ("source", source))
    mu, ignored = _codes(centroids, ("source", source))
    check_image("source", source, channels=mu.shape[1])
    check_no_forward_mode("flow_interpolate", source, t)
    return call("flow_interpolate", source, labels, t, mu, *_label(ignore_index, ignored, mu.shape[0]))


def distance_correction(
    xhat: Tensor,
    labels: Tensor,
    centroids: Tensor | Codebook,
    *,
    temperature: float | Tensor = 1.0,
    eps: float | Tensor | None = None,
    transform: str = "neg_log",
    max_norm: float | Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """The gradient of Phi = -log softmax(T(d) / tau)[y], d_k = |xhat - mu_k|^2, with respect to xhat.

    grad Phi = (2 / tau) sum_k (p_k - 1[k = y]) T'(d_k) (xhat - mu_k), in closed form and without a (B, K, H, W) array.

    Args:
        xhat: estimate of the end point, (B, C, H, W).
        labels: y, (B, H, W).
        centroids: (K, C), or a Codebook.
        temperature: tau, above 0. Default 1. This and the next two may be numbers or floating tensors of shape (), for
            schedules; they have no gradient.
        eps: added to squared distances; caps the correction near 1 / (tau sqrt(eps)). None: 0.2 * min_distance**2 of the
            Codebook; bare centroids need a number.
        transform: "neg_log" -log(d + eps) (default), "neg_sq" -d, "neg_dist" -sqrt(d + eps), "inverse" 1 / (d + eps).
        max_norm: cap on the norm of the correction of a pixel; None for no cap.
        ignore_index: as in flow_interpolate; such pixels get 0.

    Returns:
        (B, C, H, W) in the dtype of xhat, contiguous, detached: it is a target. A pixel with NaN gets NaN.

    Cost: K steps of about 14 instructions a pixel for the default; reads xhat and labels once, writes once.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    check_image("xhat", xhat)
    check_labels("labels", labels, ("xhat", xhat))
    mu, ignored = _codes(centroids, ("xhat", xhat))
    check_image("xhat", xhat, channels=mu.shape[1])
    check_choice("transform", transform, TRANSFORMS)
    _check_eps(eps, centroids)
    check_no_forward_mode("distance_correction", xhat)
    (temperature, eps, max_norm), numbers = pack(temperature=temperature, eps=eps, max_norm=max_norm)
    return call(
        "distance_correction",
        xhat.detach(),
        labels,
        mu,
        temperature,
        eps,
        transform,
        max_norm,
        *_label(ignore_index, ignored, mu.shape[0]),
        numbers,
    )


def flow_loss(
    prediction: Tensor,
    source: Tensor,
    labels: Tensor,
    t: Tensor,
    centroids: Tensor | Codebook,
    *,
    predicts: str = "velocity",
    loss_space: str | None = None,
    correction_weight: float | Tensor = 1.0,
    schedule: str = "static",
    temperature: float | Tensor = 1.0,
    eps: float | Tensor | None = None,
    transform: str = "neg_log",
    max_norm: float | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    t_min: float | Tensor = 0.05,
) -> Tensor:
    """Squared error of a flow network against the reshaped target; loss and gradient come from one pass.

    With x_t = (1-t) x0 + t x1, x1 = mu_y, g = grad Phi at the estimated end point (distance_correction, detached) and
    w = 1 ("static") or 1 - t ("annealed"):

    - velocity space: |v - (x1 - x0 - lambda w g)|^2. For an endpoint prediction v = (xhat - x_t) / m and the true velocity is
      (x1 - x_t) / m, with m = max(1 - t, t_min).
    - endpoint space: |xhat - (x1 - lambda w g)|^2. For a velocity prediction xhat = x_t + (1 - t) v.

    Args:
        prediction: velocity or end point, as `predicts` says, (B, C, H, W).
        source: x0, (B, C, H, W), of any floating dtype.
        labels: y, (B, H, W).
        t: (B,), times in [0, 1], on the CPU checked to within their rounding.
        centroids: (K, C), or a Codebook.
        predicts: "velocity" (default) or "endpoint".
        loss_space: "velocity", "endpoint" or None for the space of the prediction.
        correction_weight: lambda, at least 0; 0 is vanilla flow matching. A number, or for schedules a floating tensor of
            shape (), which has no gradient; so are temperature, eps, max_norm and t_min.
        schedule, temperature, eps, transform, max_norm: of the correction, as in distance_correction.
        ignore_index: label of pixels that carry no loss and no gradient.
        reduction: "none": (B, H, W), the mean over channels of the squared error, 0 where ignored. "sum": its sum.
            "mean" (default): its sum over the number of valid pixels; 0 if there is none.
        t_min: smallest divisor in velocity space for an endpoint prediction.

    Returns:
        The loss in fp32 (fp64 for fp64 predictions): a scalar, or (B, H, W). NaN in a valid pixel makes it NaN.

    Differentiable in prediction, once, with torch.func.grad, vjp and vmap too; a second derivative and forward mode raise
    NotImplementedError. Bitwise repeatable.
    Cost: reads prediction, source and labels once and writes the gradient once; backward keeps that and the prediction.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    check_image("prediction", prediction)
    like = ("prediction", prediction)
    check_image("source", source, like=like)
    check_labels("labels", labels, like)
    check_time("t", t, like)
    mu, ignored = _codes(centroids, like)
    check_image("prediction", prediction, channels=mu.shape[1])
    check_choice("predicts", predicts, SPACES)
    space = predicts if loss_space is None else loss_space
    check_choice("loss_space", space, SPACES)
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("transform", transform, TRANSFORMS)
    check_no_forward_mode("flow_loss", prediction, source, t)
    if isinstance(correction_weight, Tensor) or correction_weight != 0:
        # Vanilla flow matching has no use for eps, so bare centroids need not give one.
        _check_eps(eps, centroids)
    (correction_weight, temperature, eps, max_norm, t_min), numbers = pack(
        correction_weight=correction_weight, temperature=temperature, eps=eps, max_norm=max_norm, t_min=t_min
    )
    loss, _, _ = call(
        "flow_loss",
        prediction,
        source.detach(),
        labels,
        t.detach(),
        mu,
        predicts,
        space,
        correction_weight,
        schedule,
        temperature,
        eps,
        transform,
        max_norm,
        *_label(ignore_index, ignored, mu.shape[0]),
        reduction,
        t_min,
        numbers,
        # vmap hides whether what it wraps needs a gradient.
        torch.is_grad_enabled() and (prediction.requires_grad or under_transform(prediction)),
    )
    return loss


def nearest_centroid(
    x: Tensor,
    codebook: Tensor | Codebook,
    *,
    out_dtype: torch.dtype = torch.int64,
    return_distance: bool = False,
    return_margin: bool = False,
    ignore_index: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Decode: argmin_k |x - mu_k|, ties to the lowest index, exactly as a search through every centroid.

    Args:
        x: (B, C, H, W).
        codebook: a Codebook (for C = 3 its decode grid makes the cost nearly independent of K), or (K, C) centroids.
        out_dtype: uint8, int16, int32 or int64 (default).
        return_distance: also the Euclidean distance to the nearest centroid.
        return_margin: also the margin, second smallest minus smallest distance (inf for K = 1): a confidence.
        ignore_index: label of a pixel with NaN; default the codebook's. For bare centroids 255, and -1 if there are more than
            255 of them.

    Returns:
        labels (B, H, W), or a tuple (labels, distance, margin) of those asked for; distance and margin in fp32 (fp64 for
        fp64 inputs). A pixel with NaN gets ignore_index and NaN.

    Not differentiable. Cost: reads x once, writes the labels once.

    Raises:
        TypeError, ValueError: as flow_interpolate; ValueError when out_dtype cannot hold the labels.
    """
    check_image("x", x)
    mu, ignored = _codes(codebook, ("x", x), "codebook")
    check_image("x", x, channels=mu.shape[1])
    if out_dtype not in LABEL_DTYPES:
        raise TypeError(f"out_dtype: wanted uint8, int16, int32 or int64; got {out_dtype}")
    if ignore_index is None and ignored is None:
        ignore_index = _IGNORE_INDEX if mu.shape[0] <= _IGNORE_INDEX else -1
    found = call(
        "nearest_centroid",
        x.detach(),
        mu,
        isinstance(codebook, Codebook),
        str(out_dtype).removeprefix("torch."),
        return_distance,
        return_margin,
        *_label(ignore_index, ignored, mu.shape[0]),
    )
    if not (return_distance or return_margin):
        return found[0]
    return (found[0], *((found[1],) if return_distance else ()), *((found[2],) if return_margin else ()))


def decode_confusion(
    x: Tensor, target: Tensor, codebook: Tensor | Codebook, *, ignore_index: int | None = None
) -> Tensor:
    """Decode and count in one pass: counts[truth, prediction]; no label map is stored.

    Args:
        x: (B, C, H, W).
        target: true labels, (B, H, W).
        codebook: a Codebook, or (K, C) centroids.
        ignore_index: target label of pixels that do not count; default the codebook's, 255 for bare centroids.

    Returns:
        (K, K) int64, 8 K^2 bytes. Add those of several batches; the sum over all entries is the number of valid pixels, less pixels
        with NaN, which decode to no class.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    check_image("x", x)
    check_labels("target", target, ("x", x))
    mu, ignored = _codes(codebook, ("x", x), "codebook")
    check_image("x", x, channels=mu.shape[1])
    label = _label(ignore_index, ignored, mu.shape[0])
    return call("decode_confusion", x.detach(), target, mu, isinstance(codebook, Codebook), *label)


def neural_field(
    x: Tensor,
    weights: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    norm_weight: Tensor | None,
    out_norm_weight: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    patch_size: int = 16,
    mlp_ratio: int = 2,
    eps: float = 1e-6,
    normalise: str = "both",
    form: str = "residual",
) -> Tensor:
    """The pixel neural field of PixNerd (arXiv 2507.23268): a small MLP a patch, with generated weights, at its pixels.

    h = embed_weight [x, DCT] + embed_bias; for each of L blocks h += silu(RMSNorm(h) W1n) W2n, where W1n and W2n are the
    generated weights with columns of unit length; out = out_weight RMSNorm(h) + out_bias.

    Args:
        x: (B, C, H, W), H and W divisible by patch_size.
        weights: (B, N, L, 2 r Hx^2) = [W1 (Hx, r Hx) | W2 (r Hx, Hx)] of each block; N = H W / patch_size^2 patches in
            row-major order.
        embed_weight, embed_bias: (Hx, C + F^2), (Hx,): acting on the C channels, then the F^2 cosine features.
        norm_weight: (L, Hx), gains of the RMSNorm of each block; None in the plain form.
        out_norm_weight: (Hx,), gain of the last RMSNorm; None in the plain form.
        out_weight, out_bias: (C, Hx), (C,).
        patch_size: p. Default 16.
        mlp_ratio: r. Default 2.
        eps: of the RMSNorms. Default 1e-6.
        normalise: "both" (default), or "first": W2 is used as it was generated (PixNerd's text model).
        form: "residual" (default), or "plain": h = silu(h W1n) W2n without residual and RMSNorms, out = out_weight h + out_bias
            (FlowSeg, arXiv 2603.19218, writes its decoder so).

    Returns:
        (B, C, H, W) in the dtype of x, contiguous.

    Differentiable in all eight tensors; backward recomputes the forward and keeps nothing but the inputs. Second derivatives,
    forward mode and torch.func transforms run the plain PyTorch formula, at its cost in time and memory.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    arguments = checked_arguments(
        x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias,
        patch_size=patch_size, mlp_ratio=mlp_ratio, eps=eps, normalise=normalise, form=form,
    )  # fmt: skip
    return _plain_neural_field(*arguments) if under_transform(*arguments) else call_op("neural_field", *arguments)
