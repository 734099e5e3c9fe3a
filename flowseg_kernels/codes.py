"""Sequences of category codes: each class is a point (its centroid) in [-1, 1]^C.

There are four: the Kronecker sequence of the paper (arXiv 2603.19218), the R-sequence (M. Roberts, 2018), a Kronecker sequence
found by a deterministic search, and a regular grid. The paper's codes are the default, although others are better spaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .derived import smallest_distance

__all__ = ["grid_centroids", "kronecker_centroids"]

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


def _check_counts(num_classes: int, channels: int) -> None:
    for name, value in (("num_classes", num_classes), ("channels", channels)):
        if not hasattr(type(value), "__index__"):
            raise TypeError(f"{name}: wanted an int; got {type(value).__name__}")
    if not 1 <= num_classes <= 65536:
        raise ValueError(f"num_classes: wanted 1 to 65536; got {num_classes}")
    if channels < 1:
        raise ValueError(f"channels: wanted at least 1; got {channels}")


def _first_primes(count: int) -> list[int]:
    primes: list[int] = list(_PRIMES[:count])
    number = primes[-1]
    while len(primes) < count:
        number += 2
        if all(number % p for p in primes if p * p <= number):
            primes.append(number)
    return primes


def _r_sequence_alpha(channels: int) -> Tensor:
    """alpha_j = g^-j, where g is the real root above 1 of g^(C+1) = g + 1."""
    g = 2.0
    for _ in range(64):
        g = (1 + g) ** (1 / (channels + 1))
    return torch.tensor([g ** -(j + 1) for j in range(channels)], dtype=torch.float64)


def _kronecker(alpha: Tensor, num_classes: int) -> Tensor:
    """frac(k alpha) for k = 1..K, stretched to [-1, 1] in each channel; alpha (..., C) -> (..., K, C)."""
    k = torch.arange(1, num_classes + 1, dtype=torch.float64)
    points = torch.frac(k[:, None] * alpha[..., None, :])
    low, high = points.amin(dim=-2, keepdim=True), points.amax(dim=-2, keepdim=True)
    span = high - low
    # A single class has no extent: put it at the origin.
    return torch.where(span > 0, 2 * (points - low) / torch.where(span > 0, span, 1) - 1, 0)


def _searched_alpha(num_classes: int, channels: int) -> Tensor:
    """The best alpha of a fixed list of candidates: its codes have the largest smallest distance.

    Two codes n apart in the sequence differ by n alpha modulo 1, so the smallest distance on the torus needs only n < K. That
    distance ranks many candidates cheaply; the best ones are measured exactly.
    """
    candidates = max(32, min(4096, 30_000_000 // (num_classes * channels)))
    index = torch.arange(1, candidates + 1, dtype=torch.float64)
    # An R-sequence covers the cube of alphas evenly and is the same on every machine.
    alphas = torch.frac(0.5 + index[:, None] * _r_sequence_alpha(channels))
    alphas = torch.cat(
        (_r_sequence_alpha(channels)[None], torch.tensor(_first_primes(channels)).double().sqrt()[None], alphas)
    )
    n = torch.arange(1, num_classes, dtype=torch.float64)
    score = torch.empty(alphas.shape[0], dtype=torch.float64)
    for at in range(0, alphas.shape[0], 64):
        step = torch.frac(n[:, None] * alphas[at : at + 64, None])
        step = torch.minimum(step, 1 - step)
        score[at : at + 64] = step.square().sum(dim=2).amin(dim=1)
    # Round the scores and sort them stably, so that every machine finds the same codes: a model may be decoded elsewhere.
    kept = min(12 if num_classes <= 4096 else 1, alphas.shape[0])
    best = score.round(decimals=9).sort(descending=True, stable=True).indices[:kept].sort().values
    if best.numel() == 1:
        return alphas[best[0]]
    exact = [round(float(smallest_distance(_kronecker(alphas[i], num_classes))), 6) for i in best]
    return alphas[best[max(range(len(exact)), key=exact.__getitem__)]]


def _target(device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    default = torch.get_default_device()
    return "cpu" if default.type == "meta" else default


def kronecker_centroids(
    num_classes: int,
    channels: int = 3,
    *,
    sequence: str = "sqrt_primes",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Centroids on a Kronecker sequence: mu_k = 2 stretch(frac(k alpha)) - 1, k = 1..K.

    Args:
        num_classes: K, 1 to 65536.
        channels: C, at least 1 (compiled kernels take up to 16).
        sequence: "sqrt_primes" (default, the paper's codes): alpha_j = sqrt of the j-th prime. "r_sequence": alpha_j = g^-j,
            g^(C+1) = g + 1. "searched": the alpha of a fixed list with the largest smallest distance; may take seconds for many
            classes.
        dtype: default float32.
        device: default torch's default device. In a meta context the CPU, as codes need values.

    Returns:
        (K, C) tensor in [-1, 1]. Smallest distances at K = 150, C = 3: 0.154, 0.226, and 0.390 for "searched".

    Raises:
        ValueError: for any other count or sequence.
    """
    _check_counts(num_classes, channels)
    # Compute on the CPU in fp64, so that every machine gets the same codes.
    with torch.device("cpu"):
        if sequence == "sqrt_primes":
            alpha = torch.tensor(_first_primes(channels), dtype=torch.float64).sqrt()
        elif sequence == "r_sequence":
            alpha = _r_sequence_alpha(channels)
        elif sequence == "searched":
            alpha = _searched_alpha(num_classes, channels) if num_classes > 2 else _r_sequence_alpha(channels)
        else:
            raise ValueError(f"sequence: wanted 'sqrt_primes', 'r_sequence' or 'searched'; got {sequence!r}")
        codes = _kronecker(alpha, num_classes)
    return codes.to(dtype=dtype or torch.float32, device=_target(device))


def grid_centroids(
    num_classes: int,
    channels: int = 3,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Centroids on the smallest regular grid over [-1, 1]^C with at least K points. K of them are used, evenly spaced in order.

    Args:
        num_classes: K, 1 to 65536.
        channels: C, at least 1.
        dtype, device: as in kronecker_centroids.

    Returns:
        (K, C) tensor in [-1, 1]. Smallest distance at K = 150, C = 3: 0.400.

    Raises:
        ValueError: for any other count.
    """
    _check_counts(num_classes, channels)
    side = 1
    while side**channels < num_classes:
        side += 1
    points = side**channels
    place = [k * points // num_classes for k in range(num_classes)]
    digits = [[p // side**c % side for c in range(channels)] for p in place]
    grid = torch.tensor(digits, dtype=torch.float64, device="cpu")
    grid = grid * (2 / (side - 1)) - 1 if side > 1 else torch.zeros_like(grid)
    return grid.to(dtype=dtype or torch.float32, device=_target(device))
