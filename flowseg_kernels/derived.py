"""A cache of values derived from codes: their smallest distance, the default eps and the tables of decoding.

Frameworks fill, cast, average, broadcast and offload the tensors of a module. Derived values stored in the module would be
changed too, or would go out of date. So they are stored here, and the values of the codes are the key: at every call `derived_from`
compares the codes with the known ones. On a CPU that costs a few microseconds for 150 codes. On other devices the values are read
once per version of a tensor, as reading them waits for the device.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .runtime.backend import automatic_backend

__all__ = [
    "LARGEST_LABEL",
    "Derived",
    "check_codes",
    "derived_from",
    "eps_of",
    "forget",
    "ignored_label",
    "label_of",
    "smallest_distance",
]

_T = TypeVar("_T")
#: Number of sets of codes whose derived values are kept after the last codebook with them is gone.
_KEPT = 8
#: Number of tensors on other devices whose values are remembered.
_KEPT_ON_DEVICES = 64


def smallest_distance(centroids: Tensor) -> float:
    """Smallest Euclidean distance between two rows of (K, C) centroids, in fp64; inf for one centroid."""
    mu = centroids.detach().to("cpu", torch.float64)
    rows = torch.arange(mu.shape[0], device="cpu")
    if mu.shape[0] > 2048:
        rows = _rows_with_close_neighbours(mu)
    smallest = math.inf
    for part in rows.split(max(1, (1 << 22) // mu.shape[0])):
        d = torch.cdist(mu[part], mu, compute_mode="donot_use_mm_for_euclid_dist")
        d[torch.arange(len(part), device="cpu"), part] = math.inf
        smallest = min(smallest, float(d.min()))
    return smallest


def _rows_with_close_neighbours(mu: Tensor) -> Tensor:
    """A small set of rows that contains the closest pair.

    A code decoded among all codes has distance 0 to itself. So its margin is the distance to its nearest neighbour. The rows with
    the smallest margins are kept.
    """
    single = mu.float().contiguous()
    image = single.T.reshape(1, -1, 1, mu.shape[0])
    with automatic_backend():
        # No grid, int64 labels, the margin but no distance, no ignored label.
        margin = torch.ops.flowseg.nearest_centroid(image, single, False, "int64", False, True, None, -1)[2].flatten()
    # fp32 rounding may reorder distances that are this close.
    close = (margin <= margin.min() * (1 + 1e-5) + 1e-7).nonzero()[:, 0]
    # In a regular grid every row has the smallest distance; any of those rows gives it.
    return close[:4096]


#: Number of decodes without a grid after codes were written into a buffer. An average may change such codes at each step, and
#: building a grid takes as long as many decodes.
_USES_WITHOUT_GRID = 2
#: With more codes than this, building the tables takes up to ten seconds. So it waits until as many pixels were decoded as there
#: are codes: a search of so few pixels takes less.
_MANY_CODES = 2048


class Derived:
    """The values derived from one set of codes. Each value is computed at its first use.

    Attributes:
        codes: (K, C) on the CPU, fp32 or fp64, a copy.
        min_distance: smallest Euclidean distance between two codes, inf for K = 1.
        default_eps: 0.2 * min_distance**2; 0.2 for K = 1, 1e-6 if two codes coincide.
    """

    def __init__(self, codes: Tensor):
        self.codes = codes
        self._cached: dict[object, object] = {}
        #: Whether these codes were given on purpose (made or loaded). Then their tables are built at the first decode.
        self.settled = False
        self._uses = self._pixels = 0
        self._warned = False

    # The codes of this object never change, so copies of a module share it.
    def __deepcopy__(self, memo) -> Derived:
        return self

    def __reduce__(self):
        return _known_again, (self.codes,)

    @functools.cached_property
    def min_distance(self) -> float:
        return smallest_distance(self.codes)

    @property
    def default_eps(self) -> float:
        spacing = self.min_distance if math.isfinite(self.min_distance) else 1.0
        if spacing == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "codebook: two of its codes coincide, so their classes cannot be told apart, and eps has no scale; are these "
                "the codes of the file that was to be loaded?",
                stacklevel=3,
            )
        # Coinciding codes give no scale; any positive number keeps the loss finite.
        return 0.2 * spacing**2 if spacing > 0 else 1e-6

    def cached(self, key: object, compute: Callable[[], _T]) -> _T:
        """compute(), called at the first request for `key` only."""
        if key not in self._cached:
            with torch.inference_mode(False):
                self._cached[key] = compute()
        return self._cached[key]

    def codes_on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the codes on a device, cast if `dtype` is given. Every call returns the same tensor."""
        key = device, dtype or self.codes.dtype
        return self.cached(key, lambda: self.codes.to(*key, copy=True))

    def is_rounded(self, codes: Tensor) -> bool:
        """Whether `codes`, of any dtype and device, are these codes cast to that dtype."""
        return torch.equal(self.codes.to(codes.dtype), _on_cpu(codes))

    def count_decode(self, pixels: int) -> bool:
        """Count a decode of some pixels. Return whether it should use tables, which are then built if necessary."""
        self._uses += 1
        self._pixels += pixels
        classes = self.codes.shape[0]
        if classes > _MANY_CODES and self._pixels < classes:
            return False
        return self.settled or self._uses > _USES_WITHOUT_GRID


def check_codes(name: str, codes: Tensor) -> None:
    """Check that codes are (K, C), floating and finite.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if codes.ndim != 2 or not 1 <= codes.shape[0] <= 65536 or codes.shape[1] < 1:
        raise ValueError(f"{name}: wanted shape (K, C) with 1 <= K <= 65536; got {tuple(codes.shape)}")
    if codes.layout != torch.strided:
        raise TypeError(f"{name}: wanted a dense tensor; got layout {codes.layout}; call .to_dense()")
    if not codes.is_floating_point():
        raise TypeError(f"{name}: wanted a floating dtype; got {codes.dtype}")
    if codes.is_meta:
        raise ValueError(f"{name}: wanted values; got a meta tensor, which has none")
    if not bool(torch.isfinite(codes).all()):
        raise ValueError(f"{name}: wanted finite values; got NaN or infinity")


#: The largest ignored label: float64 represents every whole number up to it.
LARGEST_LABEL = 2**53
_WHOLE_UP_TO = {torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}

_lock = threading.Lock()
_recent: list[Derived] = []
_alive: weakref.WeakSet[Derived] = weakref.WeakSet()
_on_devices: dict[tuple, tuple[Tensor, int, object]] = {}


def derived_from(codes: Tensor) -> Derived:
    """The derived values of codes (K, C), fp32 or fp64, on any device. Codes with new values get a new entry.

    Raises:
        TypeError, ValueError: for invalid codes, such as NaN.
    """
    return _of_values(codes) if codes.device.type == "cpu" else _once_per_version(codes, _of_values)


def ignored_label(ignored: Tensor) -> int:
    """The ignored label as an int, from a codebook's tensor of one element.

    Raises:
        ValueError: if it is not a whole number, for example after it was averaged with another label.
    """
    return _whole_number(ignored) if ignored.device.type == "cpu" else _once_per_version(ignored, _whole_number)


def label_of(ignored: Tensor | None, ignore_index: int) -> int:
    """The ignored label of a codebook, or `ignore_index` without a codebook."""
    return ignore_index if ignored is None else ignored_label(ignored)


def eps_of(eps: float | None, centroids: Tensor) -> float:
    """eps, or the default of these codes."""
    return derived_from(centroids).default_eps if eps is None else eps


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else _once_per_version(tensor, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _whole_number(ignored: Tensor) -> int:
    if ignored.dtype is torch.float64 and ignored.ndim == 0 and not ignored.is_meta:
        value = ignored.item()
        if value.is_integer() and -LARGEST_LABEL <= value <= LARGEST_LABEL:
            return int(value)
    if ignored.numel() != 1 or ignored.is_complex() or ignored.is_meta:
        what = "a meta tensor" if ignored.is_meta else f"shape {tuple(ignored.shape)} of {ignored.dtype}"
        raise ValueError(f"ignored: wanted the codebook's ignored label, one whole number; got {what}")
    value = ignored.item()
    # Averaging a label with itself leaves a rounding error.
    if not abs(value) <= LARGEST_LABEL or abs(value - round(value)) > 1e-3:
        raise ValueError(f"ignored: wanted the codebook's ignored label, a whole number; got {value}")
    exact = _WHOLE_UP_TO.get(ignored.dtype)
    if exact and abs(value) > exact:
        raise ValueError(
            f"ignored: wanted the codebook's ignored label in a dtype that holds it; got {value:g} in {ignored.dtype}, which "
            f"rounds whole numbers above {exact}. Load it again into a float64 or int64 buffer"
        )
    return round(value)


def _of_values(codes: Tensor) -> Derived:
    codes = codes.detach()
    for known in _recent:  # needs no lock: the list is replaced, never modified
        if known.codes.dtype == codes.dtype and torch.equal(known.codes, codes):
            return known if known is _recent[0] else _to_front(known)
    with _lock:
        for known in _alive:
            if known.codes.dtype == codes.dtype and torch.equal(known.codes, codes):
                break
        else:
            check_codes("centroids", codes)
            with torch.inference_mode(False):
                known = Derived(codes.clone(memory_format=torch.contiguous_format))
            _alive.add(known)
    return _to_front(known)


def _to_front(known: Derived) -> Derived:
    global _recent
    with _lock:
        _recent = [known, *(other for other in _recent if other is not known)][:_KEPT]
    return known


def _known_again(codes: Tensor) -> Derived | None:
    """Unpickle derived values from the codes; None if the codes were loaded to the meta device."""
    return None if codes.is_meta else derived_from(codes)


def forget(tensor: Tensor) -> None:
    """Read this tensor's values again at the next call, even if its version is unchanged."""
    if tensor.device.type != "cpu":
        with _lock:
            for key in [key for key in _on_devices if key[2] == tensor.data_ptr()]:
                del _on_devices[key]


def _once_per_version(tensor: Tensor, read: Callable[[Tensor], object]):
    """Return read(tensor on the CPU). The result is cached until the tensor is written to.

    The cache keeps an alias of the tensor. So the memory cannot be reused for another tensor.
    """
    if tensor.is_inference():
        return read(tensor.cpu())  # an inference tensor has no version
    key = (read, tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    found = _on_devices.get(key)
    if found is not None and found[0]._version == found[1]:
        return found[2]
    version = tensor._version
    value = read(tensor.detach().cpu())
    with _lock:
        _on_devices.pop(key, None)
        _on_devices[key] = tensor.detach(), version, value
        while len(_on_devices) > _KEPT_ON_DEVICES:
            _on_devices.pop(next(iter(_on_devices)))
    return value
