"""The public functions. Each checks its arguments and fills in defaults. All but encode_labels then call one registered op.

Shapes: B images, C code channels, H x W pixels, K classes. Images are (B, C, H, W) in fp32, bf16, fp16 or fp64 with any
strides. Labels are (B, H, W) of uint8, int16, int32 or int64. Distances, sums and losses are computed in fp32, or in fp64 for
fp64 images. Formulas: arXiv 2603.19218; the derivations are in docs/ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops  # noqa: F401  registers torch.ops.flowseg
from .derived import derived_from, label_of
from .ops.class_probabilities.reference import FORMS
from .ops.distance_correction.reference import TRANSFORMS
from .ops.flow_loss.reference import REDUCTIONS, SCHEDULES, SPACES
from .ops.neural_field.checks import checked_arguments
from .ops.neural_field.reference import neural_field as _plain_neural_field
from .runtime.checks import (
    FLOAT_DTYPES,
    LABEL_DTYPES,
    check_choice,
    check_code_values,
    check_device,
    check_image,
    check_index,
    check_label_dtype,
    check_labels,
    check_tensor,
    check_time,
    compute_dtype,
    pack,
    valid_mask,
)
from .runtime.transforms import call, check_no_forward_mode, under_transform

if TYPE_CHECKING:
    from .codebook import Codebook

__all__ = [
    "class_probabilities",
    "decode_confusion",
    "distance_correction",
    "encode_labels",
    "flow_interpolate",
    "flow_loss",
    "nearest_centroid",
    "neural_field",
    "top_classes",
]

#: The default ignored label of bare centroids. It is no class of 255 or fewer centroids, whose classes end at 254.
_IGNORE_INDEX = 255


def _is_codebook(codes: object) -> bool:
    """Whether `codes` is a Codebook. codebook.py imports this module, so the class cannot be named here."""
    return getattr(type(codes), "_is_flowseg_codebook", False)


def _check_codes(codes: Tensor | Codebook, name: str, like: tuple[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Check (K, C) centroids on the device of the tensor `like`. Return them, and the ignored label of a codebook."""
    mu, ignored = codes() if _is_codebook(codes) else (codes, None)
    check_tensor(name, mu, FLOAT_DTYPES, "(K, C), or a Codebook", 2)
    if mu.shape[0] < 1:
        raise ValueError(f"{name}: wanted at least one centroid; got shape {tuple(mu.shape)}")
    if mu.requires_grad:
        raise ValueError(
            f"{name}: wanted fixed codes, because no op is differentiable in its codes; got a tensor that requires grad"
        )
    check_device(name, mu, like)
    return mu, ignored


def _resolve(
    image_name: str, image: Tensor, codes: Tensor | Codebook, name: str = "centroids"
) -> tuple[Tensor, Tensor | None]:
    """Check an image and its codes. Return the centroids in the image's compute dtype, and the ignored label of a codebook."""
    check_image(image_name, image)
    mu, ignored = _check_codes(codes, name, (image_name, image))
    if image.shape[1] != mu.shape[1]:
        raise ValueError(
            f"{image_name}: wanted {mu.shape[1]} channels, as the centroids have; got shape {tuple(image.shape)}"
        )
    dtype = compute_dtype(image.dtype)
    if mu.dtype != dtype and ignored is not None and mu.device.type != "cpu" and not torch.compiler.is_compiling():
        # Use the cached copy: reading the values of a new tensor would wait for the device.
        mu = derived_from(mu).codes_on(mu.device, dtype)
    return mu.to(dtype).contiguous(), ignored


def _ignored_label_arguments(
    ignore_index: int | None, ignored: Tensor | None, classes: int
) -> tuple[Tensor | None, int]:
    """Return the op arguments (tensor, number) for the ignored label.

    A codebook gives its tensor, which the op reads when it runs. Otherwise the tensor is None.
    """
    if ignore_index is not None:
        return None, check_index("ignore_index", ignore_index)
    if ignored is None and classes > _IGNORE_INDEX:
        raise ValueError(
            f"ignore_index: wanted a number, as the default {_IGNORE_INDEX} is one of these {classes} classes; got "
            "None. Give one such as -1, or a Codebook, which holds its own"
        )
    return ignored, _IGNORE_INDEX


def _check_eps(eps: object, codes: Tensor | Codebook) -> None:
    if eps is None and not _is_codebook(codes):
        raise ValueError(
            "eps: wanted a number above 0 for bare centroids, about 0.2 * (smallest code distance)**2; got None. "
            "A Codebook in place of the centroids sets it by itself"
        )


def check_loss_choices(*, predicts: str, loss_space: str | None, schedule: str, transform: str, reduction: str) -> None:
    """Check the options of flow_loss that are a choice of words.

    Raises:
        ValueError: naming the option.
    """
    check_choice("predicts", predicts, SPACES)
    if loss_space is not None:
        check_choice("loss_space", loss_space, SPACES)
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("transform", transform, TRANSFORMS)


def encode_labels(labels: Tensor, codebook: Tensor | Codebook, *, ignore_index: int | None = None) -> Tensor:
    """The code of each label: mu[labels]. Ignored pixels get 0.

    Args:
        labels: (B, H, W), uint8, int16, int32 or int64.
        codebook: a Codebook, or (K, C) centroids.
        ignore_index: default the codebook's, or 255 for bare centroids.

    Returns:
        (B, C, H, W) in the compute dtype of the centroids, fp32 or fp64.

    Raises:
        ValueError: for a CPU label outside [0, K) that is not ignore_index.
    """
    check_tensor("labels", labels, LABEL_DTYPES, "(B, H, W)", 3)
    mu, ignored = _check_codes(codebook, "codebook", ("labels", labels))
    mu = mu.to(compute_dtype(mu.dtype))
    check_code_values(mu)
    ignored, number = _ignored_label_arguments(ignore_index, ignored, mu.shape[0])
    # A compiled graph keeps the tensor, as its value may change between calls.
    number = ignored if ignored is not None and torch.compiler.is_compiling() else label_of(ignored, number)
    valid, classes = valid_mask(labels, mu.shape[0], number)
    return torch.where(valid[:, None], mu[classes].movedim(-1, 1), 0).contiguous()


def flow_interpolate(
    source: Tensor, labels: Tensor, t: Tensor, centroids: Tensor | Codebook, *, ignore_index: int | None = None
) -> Tensor:
    """The point of the straight path at time t: x_t = (1 - t) x0 + t mu_y.

    Args:
        source: x0, (B, C, H, W).
        labels: y, (B, H, W).
        t: (B,), times in [0, 1]. On a CPU other values are an error, except for a rounding error.
        centroids: (K, C), or a Codebook.
        ignore_index: label of pixels without a class, default the codebook's, or 255 for bare centroids. They stay at x0.

    Returns:
        x_t, (B, C, H, W) in the dtype of source, contiguous.

    Differentiable once in source and t, also with torch.func.grad, vjp and vmap. Second derivatives and forward mode raise
    NotImplementedError.
    Cost: reads source and labels once, writes x_t once.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came. On the CPU also for a label outside [0, K)
            that is not ignore_index; on other devices that pixel counts as ignored.
    """
    mu, ignored = _resolve("source", source, centroids)
    check_labels("labels", labels, ("source", source))
    check_time("t", t, ("source", source))
    check_no_forward_mode("flow_interpolate", source, t)
    return call(
        "flow_interpolate", source, labels, t, mu, *_ignored_label_arguments(ignore_index, ignored, mu.shape[0])
    )


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
    """The gradient with respect to xhat of Phi = -log softmax(T(d) / tau)[y], d_k = |xhat - mu_k|^2.

    grad Phi = (2 / tau) sum_k (p_k - 1[k = y]) T'(d_k) (xhat - mu_k), computed without a (B, K, H, W) array.

    Args:
        xhat: estimate of the end point, (B, C, H, W).
        labels: y, (B, H, W).
        centroids: (K, C), or a Codebook.
        temperature: tau, above 0. Default 1. For schedules, temperature, eps and max_norm may be floating tensors of shape ();
            they get no gradient.
        eps: added to squared distances (neg_sq does not use it). With neg_log it limits the correction to about
            1 / (tau sqrt(eps)). None: 0.2 * min_distance**2 of the
            Codebook. Bare centroids need a number.
        transform: "neg_log" -log(d + eps) (default), "neg_sq" -d, "neg_dist" -sqrt(d + eps), "inverse" 1 / (d + eps).
        max_norm: cap on the norm of each pixel's correction; None for no cap.
        ignore_index: as in flow_interpolate. Ignored pixels get 0.

    Returns:
        (B, C, H, W) in the dtype of xhat, contiguous and detached, as it is a target. A pixel with NaN gets NaN.

    Cost: K steps of about 14 instructions per pixel for the default transform; reads xhat and labels once, writes once.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    mu, ignored = _resolve("xhat", xhat, centroids)
    check_labels("labels", labels, ("xhat", xhat))
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
        *_ignored_label_arguments(ignore_index, ignored, mu.shape[0]),
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
    """Squared error of a flow network against the target that the correction has moved. One pass computes loss and gradient.

    Let x_t = (1-t) x0 + t x1, x1 = mu_y, g = grad Phi at the estimated end point (distance_correction, detached) and
    w = 1 ("static") or 1 - t ("annealed").

    - velocity space: |v - (x1 - x0 - lambda w g)|^2. For an endpoint prediction v = (xhat - x_t) / m and the true velocity is
      (x1 - x_t) / m, with m = max(1 - t, t_min).
    - endpoint space: |xhat - (x1 - lambda w g)|^2. For a velocity prediction xhat = x_t + (1 - t) v.

    Args:
        prediction: velocity or end point, as `predicts` says, (B, C, H, W).
        source: x0, (B, C, H, W), of any floating dtype.
        labels: y, (B, H, W).
        t: (B,), times in [0, 1]. On a CPU other values are an error, except for a rounding error.
        centroids: (K, C), or a Codebook.
        predicts: "velocity" (default) or "endpoint".
        loss_space: "velocity", "endpoint" or None for the space of the prediction.
        correction_weight: lambda, at least 0; 0 is vanilla flow matching. For schedules, correction_weight, temperature, eps,
            max_norm and t_min may be floating tensors of shape (); they get no gradient.
        schedule: w, "static" (default) or "annealed".
        temperature, eps, transform, max_norm: of the correction, as in distance_correction.
        ignore_index: label of pixels that carry no loss and no gradient.
        reduction: "none": (B, H, W), the mean over channels of the squared error, 0 for ignored pixels. "sum": its sum.
            "mean" (default): its sum divided by the number of valid pixels; 0 without valid pixels.
        t_min: smallest divisor in velocity space for an endpoint prediction.

    Returns:
        The loss in fp32 (fp64 for fp64 predictions): a scalar, or (B, H, W). NaN in a valid pixel makes it NaN.

    Differentiable once in prediction, also with torch.func.grad, vjp and vmap. Second derivatives and forward mode raise
    NotImplementedError. Bitwise repeatable.
    Cost: reads prediction and source once and writes the gradient once. Reads the labels once, or twice if valid pixels are counted
    first (compiled kernels, "mean"). The gradient and the prediction stay in memory until the backward.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    mu, ignored = _resolve("prediction", prediction, centroids)
    like = ("prediction", prediction)
    check_image("source", source, like=like)
    check_labels("labels", labels, like)
    check_time("t", t, like)
    check_loss_choices(
        predicts=predicts, loss_space=loss_space, schedule=schedule, transform=transform, reduction=reduction
    )
    check_no_forward_mode("flow_loss", prediction, source, t)
    if isinstance(correction_weight, Tensor) or correction_weight != 0:
        # Vanilla flow matching does not use eps.
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
        predicts if loss_space is None else loss_space,
        correction_weight,
        schedule,
        temperature,
        eps,
        transform,
        max_norm,
        *_ignored_label_arguments(ignore_index, ignored, mu.shape[0]),
        reduction,
        t_min,
        numbers,
        # vmap hides whether the wrapped tensor needs a gradient.
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
    """Decode: argmin_k |x - mu_k|, ties to the lowest index. The result is exactly that of a search through all centroids.

    Args:
        x: (B, C, H, W).
        codebook: a Codebook, or (K, C) centroids. A Codebook's decode grid (C = 3) or guesses (C from 4 to 16) make the cost nearly
            independent of K.
        out_dtype: uint8, int16, int32 or int64 (default).
        return_distance: also return the Euclidean distance to the nearest centroid.
        return_margin: also return the margin, a confidence: second smallest minus smallest distance (inf for K = 1).
        ignore_index: label of a pixel with NaN. Default the codebook's; for bare centroids 255, or -1 for more than 255 of them.

    Returns:
        labels (B, H, W). With return_distance or return_margin a tuple: labels, then distance if requested, then margin if
        requested. Distance and margin are in fp32 (fp64 for fp64 inputs). A pixel with NaN gets the label ignore_index, and NaN as
        distance and margin.

    Not differentiable. Cost: reads x once, writes the labels once. A Codebook's first call also builds its grid or guesses: 0.1 s
    for 1,000 classes, a second for 20,000 and ten for 65,536 with eight channels. On a CPU a Codebook of more than 2,048 classes
    compares all centroids until as many pixels were decoded as there are classes. For C = 3 the first call with return_margin
    builds a second decode grid (a second at K = 150, ten at K = 65,536).

    Raises:
        TypeError, ValueError: as flow_interpolate; ValueError when out_dtype cannot hold the labels.
    """
    mu, ignored = _resolve("x", x, codebook, "codebook")
    check_label_dtype("out_dtype", out_dtype)
    if ignore_index is None and ignored is None:
        ignore_index = _IGNORE_INDEX if mu.shape[0] <= _IGNORE_INDEX else -1
    found = call(
        "nearest_centroid",
        x.detach(),
        mu,
        _is_codebook(codebook),
        str(out_dtype).removeprefix("torch."),
        return_distance,
        return_margin,
        *_ignored_label_arguments(ignore_index, ignored, mu.shape[0]),
    )
    if not (return_distance or return_margin):
        return found[0]
    return (found[0], *((found[1],) if return_distance else ()), *((found[2],) if return_margin else ()))


def class_probabilities(
    x: Tensor,
    codebook: Tensor | Codebook,
    *,
    temperature: float | Tensor = 1.0,
    eps: float | Tensor | None = None,
    transform: str = "neg_log",
    form: str = "probabilities",
) -> Tensor:
    """The probability of every class: p_k = softmax_k(T(d_k) / tau), d_k = |x - mu_k|^2.

    These are the probabilities of distance_correction and flow_loss. With the defaults p_k is proportional to 1 / (d_k + eps).
    The result has K numbers per pixel; top_classes returns the largest ones without it.

    Args:
        x: (B, C, H, W).
        codebook: a Codebook, or (K, C) centroids.
        temperature, eps, transform: as in distance_correction.
        form: "probabilities" (default), "log_probabilities" log p_k, or "logits" T(d_k) / tau.

    Returns:
        (B, K, H, W) in fp32 (fp64 for fp64 inputs), contiguous. A pixel with NaN or infinity, or whose squared norm overflows, gets
        NaN.

    Not differentiable: a derivative raises NotImplementedError.
    Cost: two passes over the classes (logits one; probabilities with another transform or temperature three) of about 2 C + 3
    instructions per pixel and class, and the K numbers written once.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    mu, _ = _resolve("x", x, codebook, "codebook")
    check_choice("transform", transform, TRANSFORMS)
    check_choice("form", form, FORMS)
    _check_eps(eps, codebook)
    check_no_forward_mode("class_probabilities", x)
    (temperature, eps), numbers = pack(temperature=temperature, eps=eps)
    return call("class_probabilities", x, mu, temperature, eps, transform, form, numbers)


def top_classes(
    x: Tensor,
    codebook: Tensor | Codebook,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    eps: float | Tensor | None = None,
    transform: str = "neg_log",
    out_dtype: torch.dtype = torch.int64,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most probable classes and their probabilities: the first k of class_probabilities in order, without its array.

    The probabilities are exact: each is divided by the sum over all K classes. They decrease, and add up to 1 for k = K. As T
    decreases, the most probable classes are the nearest ones; the first is that of nearest_centroid.

    Args:
        x: (B, C, H, W).
        codebook: a Codebook, or (K, C) centroids.
        k: from 1 to K. Compiled kernels keep at most 16; plain PyTorch runs calls for more.
        temperature, eps, transform: as in distance_correction.
        out_dtype: dtype of the labels: uint8, int16, int32 or int64 (default).
        ignore_index: label of a pixel with NaN, as in nearest_centroid.

    Returns:
        labels (B, k, H, W) and probabilities (B, k, H, W), the nearest class first, ties to the lowest index. Probabilities are in
        fp32 (fp64 for fp64 inputs). A pixel with NaN gets the label ignore_index and NaN k times. A pixel with infinity, or whose
        squared norm overflows, gets NaN probabilities.

    Not differentiable: a derivative of the probabilities raises NotImplementedError.
    Cost: one pass over the classes with the default transform and temperature, else two; reads x once, writes k labels and
    probabilities once.

    Raises:
        TypeError, ValueError: as flow_interpolate; ValueError when k is not in [1, K] or out_dtype cannot hold the labels.
    """
    mu, ignored = _resolve("x", x, codebook, "codebook")
    k = check_index("k", k)
    if not 1 <= k <= mu.shape[0]:
        raise ValueError(f"k: wanted 1 to {mu.shape[0]}, the number of classes; got {k}")
    check_choice("transform", transform, TRANSFORMS)
    check_label_dtype("out_dtype", out_dtype)
    _check_eps(eps, codebook)
    check_no_forward_mode("top_classes", x)
    if ignore_index is None and ignored is None:
        ignore_index = _IGNORE_INDEX if mu.shape[0] <= _IGNORE_INDEX else -1
    (temperature, eps), numbers = pack(temperature=temperature, eps=eps)
    return call(
        "top_classes",
        x,
        mu,
        k,
        temperature,
        eps,
        transform,
        str(out_dtype).removeprefix("torch."),
        *_ignored_label_arguments(ignore_index, ignored, mu.shape[0]),
        numbers,
    )


def decode_confusion(
    x: Tensor, target: Tensor, codebook: Tensor | Codebook, *, ignore_index: int | None = None, by_class: bool = False
) -> Tensor:
    """Decode and count in one pass: counts[truth, prediction], or by class. No label map is stored.

    Args:
        x: (B, C, H, W).
        target: true labels, (B, H, W).
        codebook: a Codebook, or (K, C) centroids.
        ignore_index: target label of pixels that do not count, default the codebook's, or 255 for bare centroids.
        by_class: count per class instead of per pair of classes: three rows instead of K. They are enough for IoU and accuracy:
            IoU_k = hits_k / (truths_k + predictions_k - hits_k). 65,536 classes take 1.5 MB instead of 34 GB.

    Returns:
        (K, K) int64, 8 K^2 bytes, or with by_class (3, K) int64: hits (the diagonal), truths (the sums of the rows) and predictions
        (the sums of the columns). Add up the counts of several batches. The sum over all entries, or over truths, is the number of
        valid pixels without NaN, as a pixel with NaN decodes to no class.

    Raises:
        TypeError, ValueError: as flow_interpolate.
    """
    mu, ignored = _resolve("x", x, codebook, "codebook")
    check_labels("target", target, ("x", x))
    label = _ignored_label_arguments(ignore_index, ignored, mu.shape[0])
    return call("decode_confusion", x.detach(), target, mu, _is_codebook(codebook), *label, by_class)


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
    """The pixel neural field of PixNerd (arXiv 2507.23268): a small MLP with generated weights per patch, applied to its pixels.

    h = embed_weight [x, DCT] + embed_bias; for each of L blocks h += silu(RMSNorm(h) W1n) W2n, with W1n and W2n the
    generated weights normalised to columns of unit length; out = out_weight RMSNorm(h) + out_bias.

    Args:
        x: (B, C, H, W), H and W divisible by patch_size.
        weights: (B, N, L, 2 r Hx^2) = [W1 (Hx, r Hx) | W2 (r Hx, Hx)] of each block; N = H W / patch_size^2 patches in
            row-major order.
        embed_weight, embed_bias: (Hx, C + F^2), (Hx,): acting on the C channels, then the F^2 cosine features.
        norm_weight: (L, Hx), gains of each block's RMSNorm; None in the plain form.
        out_norm_weight: (Hx,), gain of the last RMSNorm; None in the plain form.
        out_weight, out_bias: (C, Hx), (C,).
        patch_size: p. Default 16.
        mlp_ratio: r. Default 2.
        eps: of the RMSNorms. Default 1e-6.
        normalise: "both" (default), or "first" to use W2 as generated (PixNerd's text model).
        form: "residual" (default), or "plain": h = silu(h W1n) W2n without residual and RMSNorms, out = out_weight h + out_bias
            (the decoder as written in FlowSeg, arXiv 2603.19218).

    Returns:
        (B, C, H, W) in the dtype of x, contiguous.

    Differentiable in all eight tensors. Backward recomputes the forward from the inputs, which are all it saves. Second
    derivatives, forward mode and torch.func transforms run the plain PyTorch formula, at its cost in time and memory.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    arguments = checked_arguments(
        x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias,
        patch_size=patch_size, mlp_ratio=mlp_ratio, eps=eps, normalise=normalise, form=form,
    )  # fmt: skip
    return _plain_neural_field(*arguments) if under_transform(*arguments) else call("neural_field", *arguments)
