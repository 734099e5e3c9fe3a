"""Codebook: the codes and the ignored label of a set of classes, as a module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .decode_grid import decode_grid
from .derived import LARGEST_LABEL, Derived, check_codes, derived_from, forget, ignored_label
from .functional import encode_labels, nearest_centroid
from .runtime.checks import check_index

__all__ = ["Codebook"]


class Codebook(torch.nn.Module):
    """The codes of a set of classes. Every function that takes centroids also takes a Codebook.

    Its state is two buffers: the codes and the ignored label. Everything else is computed from their values, and computed again
    when the values change, for any reason: loading, averaging, broadcasting, filling, moving. The codes stay in fp32 (or fp64)
    when a model is cast to bf16 or fp16, as 150 codes are only 0.15 apart. Loading a state of another K or C resizes the codebook.

    Args:
        centroids: (K, C), K from 1 to 65536, finite.
        ignore_index: label of pixels without a class; pixels with NaN decode to it. Default 255. With more than 255 classes
            choose another one, such as -1.

    Attributes:
        centroids: (K, C) buffer, fp32 or fp64.
        ignored: () buffer, float64: the ignored label. Floating, as tools that average buffers average it with itself.
        ignore_index: the ignored label as an int; can be set.
        num_classes, channels: K and C.
        min_distance: smallest Euclidean distance between two codes (inf for K = 1).
        default_eps: 0.2 * min_distance**2 (0.2 for K = 1), which functions use for eps=None.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    # functional.py recognises a codebook by this, as it cannot import the class.
    _is_flowseg_codebook = True

    centroids: Tensor
    ignored: Tensor

    def __init__(self, centroids: Tensor, *, ignore_index: int = 255):
        super().__init__()
        if not isinstance(centroids, Tensor):
            raise TypeError(f"centroids: wanted a (K, C) tensor; got {type(centroids).__name__}")
        ignore_index = _check_label(ignore_index)
        check_codes("centroids", centroids)
        dtype = torch.float64 if centroids.dtype == torch.float64 else torch.float32
        self.register_buffer("centroids", _versioned(centroids.detach().to(dtype, copy=True).contiguous()))
        self.register_buffer("ignored", _versioned(torch.tensor(ignore_index, dtype=torch.float64, device="cpu")))
        # The last known values. They replace codes that a cast has rounded or a move to the meta device has dropped.
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
        """A copy of the decode grid, for inspection: (cells, records, groups, low, scale); None and 0 without a grid."""
        codes = self._values()
        grid = decode_grid(derived_from(codes)) if codes.shape[1] == 3 else None
        if grid is None:
            return None, None, None, 0.0, 0.0
        tables = (grid.cells, grid.records, grid.records_left)
        return *(v.to(codes.device, copy=True) for v in tables), grid.low, grid.scale

    # Earlier versions had the tables as buffers under these names.
    _cells = property(lambda self: self.grid[0])
    _records = property(lambda self: self.grid[1])
    _groups = property(lambda self: self.grid[2])

    def forward(self) -> tuple[Tensor, Tensor]:
        """The codes (K, C), fp32 or fp64, and the ignored label ().

        The functions call the module to read its tensors. So hooks that bring the tensors from another place run first.

        Raises:
            TypeError, ValueError: the buffers no longer hold codes; the message says what they hold.
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

        Needed only on a GPU, after a write that does not change the tensor's version: through `.data`, or by torch.distributed's
        broadcast, scatter or all_reduce on the buffers.
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
        """The known codes, if `codes` are those codes rounded by a cast that bypassed Module.to; else an error."""
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
            self._buffers["ignored"] = _versioned(label)
        self.centroids = _versioned(_moved(before, self.centroids, None if self._known is None else self._known.codes))
        return self

    def _moved_label(self, label: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        try:
            new = fn(label)
        except TypeError:
            new = fn(label.float())  # some devices have no float64
        value = self._known_label
        if new is label or type(new) is not Tensor or value is None or new.is_meta:
            return new
        dtype = torch.float32 if new.dtype == torch.float32 and abs(value) <= 2**24 else torch.float64
        if new.dtype == dtype and new.item() == value:
            return new
        return torch.tensor(value, dtype=dtype, device=new.device)

    def _remember(self) -> None:
        """Keep the values, as a move through the meta device loses them."""
        with contextlib.suppress(TypeError, ValueError):
            if not self.centroids.is_meta:
                self._known = derived_from(self._values())
            if not self.ignored.is_meta:
                self._known_label = ignored_label(self.ignored)

    def reset_parameters(self) -> None:
        """Do nothing, as codes are fixed. Frameworks call this method on modules that they moved from the meta device."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        place = prefix + "centroids"
        saved = destination.get(place)
        if isinstance(saved, Tensor) and saved.dtype not in (torch.float32, torch.float64):
            # A cast that bypassed Module.to rounded the buffer. Save the exact codes.
            destination[place] = self._full_precision(saved)
        # If two modules share a codebook, save a copy for the second: some file formats refuse two names for one memory.
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
        """Saved codes in fp32 or fp64. If they are this codebook's codes rounded, return the exact codes."""
        if saved.dtype in (torch.float32, torch.float64):
            return saved
        if self._known is not None and self._known.is_rounded(saved):
            return self._known.codes_on(saved.device).clone()
        return saved.float()

    def __getstate__(self) -> dict:
        # Copy the table of buffers: setting a buffer of a shallow copy must not change the original.
        return {**self.__dict__, "_buffers": dict(self._buffers), "_seen": None}

    def __setstate__(self, state: dict) -> None:
        # Pickles of earlier versions hold derived values as buffers and attributes.
        derived = ("num_classes", "channels", "min_distance", "default_eps", "ignore_index", "grid_low", "grid_scale")
        state = {name: value for name, value in state.items() if name not in derived}
        state["_buffers"] = {k: v for k, v in state["_buffers"].items() if k in ("centroids", "ignored")}
        state["_non_persistent_buffers_set"] = set()
        super().__setstate__({"_known": None, "_seen": None, "_known_label": None, **state})

    def encode(self, labels: Tensor) -> Tensor:
        """Codes (B, C, H, W) of labels (B, H, W) of any integer dtype; ignored pixels get 0 (the origin).

        Raises ValueError for a CPU label outside [0, K) that is not ignore_index.
        """
        return encode_labels(labels, self)

    def decode(self, x: Tensor, *, out_dtype: torch.dtype = torch.int64) -> Tensor:
        """Labels (B, H, W) of the nearest centroid for x (B, C, H, W); see nearest_centroid."""
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
    """The buffer after a framework replaced `old` by `new`: on new's device, with the dtype and values of `old` or, if it had none,
    the known values."""
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


def _versioned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: without a version its values would be read at every call."""
    if type(tensor) is not Tensor or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _same_memory(a: Tensor, b: object) -> bool:
    return isinstance(b, Tensor) and a.device == b.device and a.untyped_storage()._cdata == b.untyped_storage()._cdata
