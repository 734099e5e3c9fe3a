"""Category codes: each class is a point (its centroid) in [-1, 1]^C.

Sequences: the Kronecker sequence of the paper (arXiv 2603.19218), the R-sequence (M. Roberts, 2018), a Kronecker sequence
found by a deterministic search, and a regular grid. The paper's codes are the default; they are not the best spaced ones.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .decode_grid import build_decode_grid

__all__ = ["Codebook", "grid_centroids", "kronecker_centroids", "smallest_distance"]

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
    """alpha_j = g^-j with g the real root above 1 of g^(C+1) = g + 1."""
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
    # A single class has no extent; it sits at the origin.
    return torch.where(span > 0, 2 * (points - low) / torch.where(span > 0, span, 1) - 1, 0)


def _searched_alpha(num_classes: int, channels: int) -> Tensor:
    """The alpha, of a fixed list of candidates, whose codes have the largest smallest distance.

    Two codes n apart in the sequence differ by n alpha modulo 1, so the smallest distance on the torus needs n < K only: it
    ranks many candidates cheaply, and the best are measured exactly.
    """
    candidates = max(32, min(4096, 30_000_000 // (num_classes * channels)))
    index = torch.arange(1, candidates + 1, dtype=torch.float64)
    # An R-sequence over the cube of alphas: even cover, and the same on every machine.
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
    # Equal scores keep their order and last digits are dropped: a model trained on one machine is decoded on another.
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
        sequence: "sqrt_primes": alpha_j = sqrt of the j-th prime, the paper's codes (the default). "r_sequence":
            alpha_j = g^-j, g^(C+1) = g + 1. "searched": the best of a fixed list of alphas by smallest distance; takes up
            to seconds for many classes.
        dtype: default float32.
        device: default torch's default device (the CPU in a meta context, as codes need values).

    Returns:
        (K, C) tensor in [-1, 1]. Smallest distances at K = 150, C = 3: 0.154, 0.226, and 0.390 for "searched".

    Raises:
        ValueError: for a count or a sequence outside those.
    """
    _check_counts(num_classes, channels)
    # Worked out on the CPU in fp64 on every machine, whatever default device is set.
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
    """Centroids on the smallest regular grid over [-1, 1]^C with at least K points, K of them taken evenly in order.

    Args:
        num_classes: K, 1 to 65536.
        channels: C, at least 1.
        dtype, device: as in kronecker_centroids.

    Returns:
        (K, C) tensor in [-1, 1]. Smallest distance at K = 150, C = 3: 0.400.

    Raises:
        ValueError: for a count outside those.
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


def smallest_distance(centroids: Tensor) -> float:
    """Smallest Euclidean distance between two rows of (K, C) centroids, in fp64; inf for one centroid."""
    mu = centroids.detach().to("cpu", torch.float64)
    rows = torch.arange(mu.shape[0])
    if mu.shape[0] > 2048:
        rows = _rows_with_close_neighbours(mu)
    smallest = math.inf
    for part in rows.split(max(1, (1 << 22) // mu.shape[0])):
        d = torch.cdist(mu[part], mu, compute_mode="donot_use_mm_for_euclid_dist")
        d[torch.arange(len(part)), part] = math.inf
        smallest = min(smallest, float(d.min()))
    return smallest


def _rows_with_close_neighbours(mu: Tensor) -> Tensor:
    """Few rows of which one has the smallest distance to another row: decoding a code leaves its distance to the next as margin."""
    from .functional import nearest_centroid
    from .runtime.backend import automatic_backend

    single = mu.float()
    with automatic_backend():
        margin = nearest_centroid(single.T.reshape(1, -1, 1, mu.shape[0]), single, return_margin=True)[1].flatten()
    # fp32 rounding may reorder distances that are this close.
    close = (margin <= margin.min() * (1 + 1e-5) + 1e-7).nonzero()[:, 0]
    # A regular grid has its smallest distance everywhere; any of those rows gives it.
    return close[:4096]


class Codebook(torch.nn.Module):
    """The codes of a set of classes, with what decoding needs. Functions take one wherever they take centroids.

    The centroids stay in fp32 (or fp64) when a model is cast to bf16 or fp16: 150 codes are 0.15 apart, and the decode grid
    belongs to these very values. Device moves and state_dict work as for any module; loading a state of another K or C
    resizes the codebook.

    Args:
        centroids: (K, C), K from 1 to 65536, finite.
        ignore_index: label of pixels without a class; also what a NaN pixel decodes to. Default 255; for more than 255
            classes choose another, such as -1.

    Attributes:
        centroids: (K, C) buffer, fp32 or fp64.
        num_classes, channels: K and C.
        min_distance: smallest Euclidean distance between two codes (inf for K = 1).
        default_eps: 0.2 * min_distance**2, the eps used where a function is given eps=None (0.2 for K = 1).

    Raises:
        TypeError, ValueError: naming the argument.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, *, ignore_index: int = 255):
        super().__init__()
        if not isinstance(centroids, Tensor):
            raise TypeError(f"centroids: wanted a (K, C) tensor; got {type(centroids).__name__}")
        if not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: wanted an int; got {type(ignore_index).__name__}")
        self.register_buffer("centroids", None)
        # A tensor beside the number, so that a state_dict holds tensors only.
        self.register_buffer("ignored", torch.tensor(ignore_index, device="cpu"))
        for name in ("_cells", "_records", "_groups"):
            self.register_buffer(name, None, persistent=False)
        # A device context of the caller's (even meta) must not reach the numbers that the codes are worked out from.
        with torch.device("cpu"):
            self._set(centroids, ignore_index)

    def _set(self, centroids: Tensor, ignore_index: int) -> None:
        if centroids.ndim != 2 or not 1 <= centroids.shape[0] <= 65536 or centroids.shape[1] < 1:
            raise ValueError(f"centroids: wanted shape (K, C) with 1 <= K <= 65536; got {tuple(centroids.shape)}")
        if not centroids.is_floating_point():
            raise TypeError(f"centroids: wanted a floating dtype; got {centroids.dtype}")
        if centroids.is_meta:
            raise ValueError("centroids: wanted values; got a meta tensor, which has none")
        if not bool(torch.isfinite(centroids).all()):
            raise ValueError("centroids: wanted finite values; got NaN or infinity")
        dtype = torch.float64 if centroids.dtype == torch.float64 else torch.float32
        self.centroids = centroids.detach().to(dtype, copy=True).contiguous()
        self.num_classes, self.channels = centroids.shape
        self.min_distance = smallest_distance(self.centroids)
        spacing = self.min_distance if math.isfinite(self.min_distance) else 1.0
        # Coinciding codes leave no scale of their own; any positive number keeps the loss finite.
        self.default_eps = 0.2 * spacing**2 if spacing > 0 else 1e-6
        self.grid_low = self.grid_scale = 0.0
        self._cells = self._records = self._groups = None
        self.ignore_index = ignore_index
        if 0 <= ignore_index < self.num_classes:
            warnings.warn(
                f"Codebook: ignore_index {ignore_index} is also one of its {self.num_classes} classes, which will be ignored; "
                "pass another ignore_index, such as -1, if that is not wanted",
                stacklevel=3,
            )
        grid = build_decode_grid(self.centroids.float()) if self.channels == 3 else None
        if grid is not None:
            self.grid_low, self.grid_scale = grid.low, grid.scale
            device = self.centroids.device
            self._cells, self._records, self._groups = (v.to(device) for v in (grid.cells, grid.records, grid.groups))

    @property
    def grid(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, float]:
        """The decode grid's (cells, records, groups, low, scale); None for other than three channels."""
        return self._cells, self._records, self._groups, self.grid_low, self.grid_scale

    def _apply(self, fn, recurse=True):
        kept = self.centroids, self._records
        super()._apply(fn, recurse)
        device = self.centroids.device
        # A cast must not touch the codes; a move must take them along.
        if self.centroids.dtype != kept[0].dtype:
            self.centroids = kept[0].to(device)
        if self._records is not None and self._records.dtype != kept[1].dtype:
            self._records = kept[1].to(device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved, ignored = state_dict.get(prefix + "centroids"), state_dict.get(prefix + "ignored")
        if saved is not None and not saved.is_meta:
            own = self.centroids
            ignore_index = self.ignore_index if ignored is None else int(ignored)
            if own.is_meta or saved.shape != own.shape or not torch.equal(saved.cpu(), own.cpu()):
                with torch.device("cpu"):
                    self._set(saved if own.is_meta else saved.to(own.device), ignore_index)
            self.ignore_index = ignore_index
        super()._load_from_state_dict(state_dict, prefix, *args)

    def encode(self, labels: Tensor) -> Tensor:
        """Codes (B, C, H, W) of labels (B, H, W) of any integer dtype; 0 (the origin) where labels are ignored.

        Raises ValueError for a CPU label outside [0, K) that is not ignore_index.
        """
        from .functional import encode_labels

        return encode_labels(labels, self)

    def decode(self, x: Tensor, *, out_dtype: torch.dtype = torch.int64) -> Tensor:
        """Labels (B, H, W) of the nearest centroid for x (B, C, H, W); see nearest_centroid."""
        from .functional import nearest_centroid

        return nearest_centroid(x, self, out_dtype=out_dtype)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, channels={self.channels}, ignore_index={self.ignore_index}, "
            f"min_distance={self.min_distance:.4g}"
        )
