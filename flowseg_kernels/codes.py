"""Category codes: each class is a point (its centroid) in [-1, 1]^C.

Sequences: the Kronecker sequence of the paper (arXiv 2603.19218), the R-sequence (M. Roberts, 2018), a Kronecker sequence
found by a deterministic search, and a regular grid. The paper's codes are the default; they are not the best spaced ones.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .decode_grid import decode_tables
from .derived import LARGEST_LABEL, Derived, check_codes, derived_from, forget, ignored_label, smallest_distance
from .runtime.checks import check_index

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


class Codebook(torch.nn.Module):
    """The codes of a set of classes. Functions take one wherever they take centroids.

    Its state is two buffers: the codes and the ignored label. All else follows from their values and is found again whenever
    they change, whoever changed them: loading, averaging, broadcasting, filling, moving. The codes stay in fp32 (or fp64) when
    a model is cast to bf16 or fp16, as 150 codes are 0.15 apart. Loading a state of another K or C resizes the codebook.

    Args:
        centroids: (K, C), K from 1 to 65536, finite.
        ignore_index: label of pixels without a class; also what a NaN pixel decodes to. Default 255; for more than 255
            classes choose another, such as -1.

    Attributes:
        centroids: (K, C) buffer, fp32 or fp64.
        ignored: () buffer, float64: the ignored label. A whole number in a floating dtype survives averages of it with itself.
        ignore_index: the ignored label as an int; may be set.
        num_classes, channels: K and C.
        min_distance: smallest Euclidean distance between two codes (inf for K = 1).
        default_eps: 0.2 * min_distance**2, the eps used where a function is given eps=None (0.2 for K = 1).

    Raises:
        TypeError, ValueError: naming the argument.
    """

    centroids: Tensor
    ignored: Tensor

    def __init__(self, centroids: Tensor, *, ignore_index: int = 255):
        super().__init__()
        if not isinstance(centroids, Tensor):
            raise TypeError(f"centroids: wanted a (K, C) tensor; got {type(centroids).__name__}")
        ignore_index = _check_label(ignore_index)
        check_codes("centroids", centroids)
        dtype = torch.float64 if centroids.dtype == torch.float64 else torch.float32
        self.register_buffer("centroids", centroids.detach().to(dtype, copy=True).contiguous())
        self.register_buffer("ignored", torch.tensor(ignore_index, dtype=torch.float64, device="cpu"))
        # The values last seen: what a cast rounded, and a device without memory dropped, is taken from them.
        self._known: Derived | None = derived_from(self.centroids)
        self._known.settled = True
        self._seen: tuple[int, int] | None = None
        self._known_label: int | None = ignore_index
        if 0 <= ignore_index < self.num_classes:
            warnings.warn(
                f"Codebook: ignore_index {ignore_index} is also one of its {self.num_classes} classes, which will be ignored; "
                "pass another ignore_index, such as -1, if that is not wanted",
                stacklevel=2,
            )

    @property
    def num_classes(self) -> int:
        return self.centroids.shape[0]

    @property
    def channels(self) -> int:
        return self.centroids.shape[1]

    @property
    def min_distance(self) -> float:
        return derived_from(self._values()).min_distance

    @property
    def default_eps(self) -> float:
        return derived_from(self._values()).default_eps

    @property
    def ignore_index(self) -> int:
        return ignored_label(self.ignored)

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        self.ignored = torch.tensor(_check_label(value), dtype=self.ignored.dtype, device=self.ignored.device)
        self._known_label = int(value)

    @property
    def grid(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, float]:
        """A copy of the decode grid, to look at: (cells, records, groups, low, scale), None for other than three channels."""
        tables = decode_tables(derived_from(self._values()), self.centroids.device)
        return *(None if v is None else v.clone() for v in tables[:3]), *tables[3:]

    # Names that the tables had as buffers.
    _cells = property(lambda self: self.grid[0])
    _records = property(lambda self: self.grid[1])
    _groups = property(lambda self: self.grid[2])

    def forward(self) -> tuple[Tensor, Tensor]:
        """The codes (K, C), fp32 or fp64, and the ignored label (), as the functions read them.

        The functions call the module, so that hooks which bring its tensors from elsewhere run before they are read.

        Raises:
            TypeError, ValueError: the buffers hold no codes any more, with what became of them.
        """
        codes, ignored = self._values(), self.ignored
        if not isinstance(ignored, Tensor) or (ignored.is_meta and not codes.is_meta):
            came = "a meta tensor" if isinstance(ignored, Tensor) else type(ignored).__name__
            raise ValueError(
                f"codebook: wanted its ignored label to hold a value; got {came}. Load a whole state into the model, or set "
                "codebook.ignore_index"
            )
        return codes, ignored

    def refresh(self) -> None:
        """Read the codes and the label again at the next call.

        Needed on a GPU alone, after a write that PyTorch does not count: through `.data`, or by torch.distributed's broadcast,
        scatter or all_reduce on the buffers themselves.
        """
        forget(self.centroids)
        forget(self.ignored)
        self._seen = None

    def _values(self) -> Tensor:
        codes = self.centroids
        if not isinstance(codes, Tensor) or codes.layout != torch.strided:
            came = codes.layout if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codebook: wanted its centroids to be a dense tensor; got {came}")
        if (
            torch.compiler.is_compiling()
            or type(codes) is not Tensor
            or torch._C._functorch.is_functorch_wrapped_tensor(codes)
        ):
            _check_dtype(codes)
            return codes
        if codes.is_meta:
            raise ValueError(
                "codebook: wanted its centroids to hold values; got a meta tensor. Load a state into the model, or move it with "
                "to_empty(device=...)"
            )
        if codes.dtype not in (torch.float32, torch.float64):
            return self._unrounded(codes)
        seen = None if codes.is_inference() else (codes.data_ptr(), codes._version)
        if seen is None or seen != self._seen:
            self._known, self._seen = derived_from(codes), seen
        return codes

    def _unrounded(self, codes: Tensor) -> Tensor:
        """The known codes, where a cast that went around this module's own rule rounded them."""
        if self._known is None or not codes.is_floating_point() or not self._known.is_rounded(codes):
            _check_dtype(codes)
        return self._known.codes_on(codes.device)

    def _apply(self, fn, recurse=True):
        self._remember()
        before, label = self.centroids, self._buffers.pop("ignored")
        try:
            super()._apply(fn, recurse)
            label = self._moved_label(label, fn)
        finally:
            self._buffers["ignored"] = label
        self.centroids = _moved(before, self.centroids, None if self._known is None else self._known.codes)
        return self

    def _moved_label(self, label: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        try:
            new = fn(label)
        except TypeError:
            new = fn(label.float())  # the device has no float64
        value = self._known_label
        if new is label or type(new) is not Tensor or value is None or new.is_meta:
            return new
        dtype = torch.float32 if new.dtype == torch.float32 and abs(value) <= 2**24 else torch.float64
        if new.dtype == dtype and new.item() == value:
            return new
        return torch.tensor(value, dtype=dtype, device=new.device)

    def _remember(self) -> None:
        """Take down the values, for after a move through a device that has none."""
        with contextlib.suppress(TypeError, ValueError):
            if not self.centroids.is_meta:
                self._known = derived_from(self._values())
            if not self.ignored.is_meta:
                self._known_label = ignored_label(self.ignored)

    def reset_parameters(self) -> None:
        """Does nothing, as codes are fixed. Frameworks call it on modules that they moved from the meta device."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        place = prefix + "centroids"
        saved = destination.get(place)
        if isinstance(saved, Tensor) and saved.dtype not in (torch.float32, torch.float64):
            # A cast around this module rounded the buffer; a file gets the codes.
            destination[place] = self._full_precision(saved)
        # One codebook in two modules: file formats that refuse two names for one memory get a copy for the second name.
        for name in ("centroids", "ignored"):
            own = destination.get(prefix + name)
            others = (v for key, v in destination.items() if key.endswith(f".{name}") and key != prefix + name)
            if isinstance(own, Tensor) and any(_same_memory(own, other) for other in others):
                destination[prefix + name] = own.clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        saved, label = state_dict.get(prefix + "centroids"), state_dict.get(prefix + "ignored")
        self._remember()
        try:
            if isinstance(label, Tensor) and not label.is_meta:
                ignored_label(label)
            if isinstance(saved, Tensor) and not saved.is_meta:
                check_codes("centroids", saved)
                state_dict[prefix + "centroids"] = saved = self._full_precision(saved)
                if saved.shape != self.centroids.shape or saved.dtype != self.centroids.dtype:
                    self.centroids = torch.empty_like(saved, device=self.centroids.device)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._remember()
        if self._known is not None:
            self._known.settled = True

    def _full_precision(self, saved: Tensor) -> Tensor:
        """Saved codes in fp32 or fp64: this codebook's own where the saved ones are those, rounded."""
        if saved.dtype in (torch.float32, torch.float64):
            return saved
        if self._known is not None and self._known.is_rounded(saved):
            return self._known.codes_on(saved.device).clone()
        return saved.float()

    def __getstate__(self) -> dict:
        # A shallow copy has buffers of its own: setting one must not reach the original.
        return {**self.__dict__, "_buffers": dict(self._buffers), "_seen": None}

    def __setstate__(self, state: dict) -> None:
        # Earlier versions kept what is derived among the buffers and attributes.
        derived = ("num_classes", "channels", "min_distance", "default_eps", "ignore_index", "grid_low", "grid_scale")
        state = {name: value for name, value in state.items() if name not in derived}
        state["_buffers"] = {k: v for k, v in state["_buffers"].items() if k in ("centroids", "ignored")}
        state["_non_persistent_buffers_set"] = set()
        super().__setstate__({"_known": None, "_seen": None, "_known_label": None, **state})

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
        sizes = f"num_classes={self.num_classes}, channels={self.channels}"
        if self.centroids.is_meta or self.ignored.is_meta:
            return sizes
        return f"{sizes}, ignore_index={self.ignore_index}, min_distance={self.min_distance:.4g}"


def _check_label(ignore_index: int) -> int:
    number = check_index("ignore_index", ignore_index)
    if abs(number) > LARGEST_LABEL:
        raise ValueError(f"ignore_index: wanted at most 2**53 from 0; got {number}")
    return number


def _check_dtype(codes: Tensor) -> None:
    if codes.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"codebook: wanted its centroids in float32 or float64; got {codes.dtype}. They were cast outside of Module.to, which "
            "loses the codes' values: keep this module out of the cast, or load the codes again into a float32 buffer"
        )


def _moved(old: Tensor, new: Tensor, known: Tensor | None) -> Tensor:
    """`new`, which a framework made from the buffer `old`: of the dtype and with the values it had, or the known ones."""
    if new is old or type(new) is not Tensor:
        return new
    if new.is_meta:
        return new.to(old.dtype)
    values = known if old.is_meta else old
    if values is None:
        return new
    if new.dtype == values.dtype and new.shape == values.shape and torch.equal(new.cpu(), values.cpu()):
        return new
    return values.to(new.device, copy=True)


def _same_memory(a: Tensor, b: object) -> bool:
    return isinstance(b, Tensor) and a.device == b.device and a.untyped_storage()._cdata == b.untyped_storage()._cdata
