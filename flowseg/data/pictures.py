"""Read image files and label maps: limit of pixels, EXIF orientation and bit depth are handled here and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flowseg.config import DataConfig
from flowseg.errors import DataWarning, UserError

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Inverse orientations; the inverse of every other orientation is itself.
_BACK = {6: 8, 8: 6}
# If the brightest value of a 16-bit image is below this, the camera probably has 10, 12 or 14 bits.
_FULL_16_BIT = 2**14
# Number of values to convert at a time: a whole photograph in int64 would take eight times its size.
_BAND = 2**20
# Threads decode images of more pixels one at a time, to bound memory.
LARGE_PIXELS = 2**24


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read; the fields are settings of the ``data`` section."""

    exif: str = "upright"
    white: float | None = None
    max_megapixels: float = 256.0

    @classmethod
    def of(cls, config: DataConfig) -> Reading:
        """Take the fields from the settings of a run."""
        return cls(config.exif, config.white, config.max_megapixels)


class Shape(NamedTuple):
    """Size ``(width, height)`` of the stored pixels, and the EXIF orientation (1 to 8) in which a viewer shows them."""

    stored: tuple[int, int]
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Size of the image as a viewer shows it."""
        return turned_size(self.stored, self.orientation)


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Size of an image after turning it by an orientation."""
    return size[::-1] if orientation >= 5 else size


def read_picture(path: Path, reading: Reading) -> tuple[Image.Image, Shape]:
    """Read an RGB image, turned as a viewer shows it.

    Grey, palette and alpha images are converted. Images of more bits are reduced to 8: ``reading.white`` becomes 255. Its
    default is 65535 for 16 bits and 1.0 for floats.

    Raises:
        UserError: the file cannot be decoded, has too many pixels, or has values of unknown scale.
    """
    with opened(path, "an image", reading) as image:
        # Read the tile first: Pillow decodes a PNG file to find its orientation, and then forgets how it was stored.
        deep_color = ";16" in str(image.tile)
        shape = _shape(image)
        image.load()
        picture = image
        if image.mode.startswith("I") or image.mode == "F":
            picture = Image.fromarray(_eight_bits(path, image, reading.white))
        elif deep_color and reading.white is None:
            _check_upper_byte(path, image)
        elif deep_color and reading.white != 65535:
            raise UserError(
                f"{path}: image has 16-bit colours with white at 65535, but data.white is {reading.white:g}; only grey images can "
                "have another white; save this image with 8 bits"
            )
        # For an RGB image, convert() would make a copy.
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        # Read the orientation again: Pillow turns TIFF files while it decodes them.
        turn = _TURNS.get(_tag(image))
        return (picture.transpose(turn) if turn is not None else picture), shape


def as_picture(image: object, reading: Reading) -> tuple[Image.Image, Shape]:
    """Convert a path, a Pillow image or an array to an RGB image.

    Args:
        image: a path, a Pillow image of any mode, or a numpy array: ``(H, W)`` or ``(H, W, 1 | 3 | 4)`` uint8, or ``(H, W)``
            of 16 bits, 32 bits or floats. Only the image of a path is turned as a viewer shows it. Alpha is dropped. More
            than 8 bits are reduced as in :func:`read_picture`.
        reading: how files are read.

    Raises:
        UserError: another type, or see :func:`read_picture`.
    """
    if isinstance(image, str | Path):
        return read_picture(Path(image), reading)
    if isinstance(image, np.ndarray):
        image = _picture_of_array(image)
    if not isinstance(image, Image.Image):
        raise _no_picture(type(image).__name__, image)
    try:
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_eight_bits("image", image, reading.white))
        picture = image.convert("RGB")
    except UserError:
        raise
    # Pillow opens files lazily: load() may have to decode one.
    except Exception as error:
        raise UserError(f"image: cannot be read ({str(error) or type(error).__name__})") from None
    return picture, Shape(picture.size)


def _picture_of_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    colors = pixels.ndim == 3 and pixels.shape[-1] in (3, 4) and pixels.dtype == np.uint8
    deep = {"u2": np.uint16, "i4": np.int32, "u4": np.int64, "f2": np.float32, "f4": np.float32, "f8": np.float32}
    code = f"{pixels.dtype.kind}{pixels.dtype.itemsize}"
    grey = pixels.ndim == 2 and (pixels.dtype == np.uint8 or code in deep)
    if not (colors or grey) or 0 in pixels.shape:
        raise _no_picture("array", array)
    if code in deep:
        pixels = pixels.astype(deep[code])
        if pixels.dtype == np.int64:
            # Pillow has no unsigned 32-bit mode.
            if pixels.max() >= 2**31:
                raise _no_picture("array with values from 2**31 on", array)
            pixels = pixels.astype(np.int32)
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3] if colors else pixels))


def _no_picture(kind: str, image: object) -> UserError:
    facts = f" of shape {tuple(image.shape)} and dtype {image.dtype}" if hasattr(image, "shape") else ""
    return UserError(
        "image: wanted a path, a Pillow image, or a numpy array (H, W, 3) of uint8 (0 to 255), (H, W, 4) with alpha or "
        f"(H, W) grey; got {kind}{facts}"
    )


def turn_back(picture: Image.Image, orientation: int) -> Image.Image:
    """Turn an upright image into the form in which a file of this orientation stores it."""
    turn = _TURNS.get(_BACK.get(orientation, orientation))
    return picture if turn is None else picture.transpose(turn)


def read_shape(path: Path, kind: str, reading: Reading) -> Shape:
    """Read size and orientation from the header. The orientation of a PNG file is missed if it follows the pixels."""
    with opened(path, kind, reading) as image:
        return _shape(image, header=True)


def read_values(path: Path, reading: Reading) -> tuple[np.ndarray, Shape]:
    """Read label values ``(H, W)`` uint8 or uint16, turned by the orientation of the label file.

    The values of a palette image are its indices, never its colours. Grey values of 1, 2 and 4 bits are read as stored.

    Raises:
        UserError: the file cannot be decoded, has too many pixels or several channels, or its values are not whole numbers.
    """
    with opened(path, "a label map", reading) as image:
        tile = str(image.tile)
        shape = _shape(image)
        if image.format in ("JPEG", "MPO"):
            raise UserError(f"{path}: label map is a JPEG file, and JPEG changes label values; save it as PNG")
        image.load()
        values = np.asarray(image)
        if values.ndim != 2:
            raise UserError(
                f"{path}: label map must have one channel of class indices, got {values.shape[-1]} (mode {image.mode})"
            )
        if image.mode == "L":
            values = _unscaled(path, values, tile)
        if values.dtype.kind not in "bui" or (
            values.dtype.itemsize > 2 and not 0 <= values.min(initial=0) <= values.max(initial=0) <= 65535
        ):
            raise UserError(f"{path}: label values must be whole numbers in 0..65535 (mode {image.mode})")
        values = values.astype(np.uint16 if values.dtype.itemsize > 1 else np.uint8, copy=False)
        return turn_values(values, _tag(image)), shape


def turn_values(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an array ``(H, W)`` by an EXIF orientation; the result is a view."""
    if orientation in (5, 6, 7, 8):
        values = values.T
    across = orientation in (2, 3, 6, 7)
    down = orientation in (3, 4, 7, 8)
    return values[:: -1 if down else 1, :: -1 if across else 1]


def stored_values(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an upright array ``(H, W)`` into the form in which a file of this orientation stores it; the result is a view."""
    return turn_values(values, _BACK.get(orientation, orientation))


def turn_of_labels(path: Path, labels: Shape, image: Shape, exif: str) -> int:
    """The orientation by which to turn a label map so that it matches its upright image.

    If the label map has an EXIF orientation, that decides. Otherwise it was drawn on the image as a viewer shows it
    (``exif="upright"``) or on the stored pixels (``"stored"``).

    Raises:
        UserError: the sizes differ; the message says so if the other setting would fit.
    """
    own = labels.orientation != 1
    turn = labels.orientation if own else image.orientation if exif == "stored" else 1
    if turned_size(labels.stored, turn) == image.upright:
        return turn
    is_, wanted = _by(turned_size(labels.stored, turn)), _by(image.upright)
    other = 1 if exif == "stored" else image.orientation
    if not own and turned_size(labels.stored, other) == image.upright:
        drawn, setting = ("what a viewer shows", "upright") if exif == "stored" else ("the stored pixels", "stored")
        raise UserError(
            f"{path}: label map is {_by(labels.stored)}; its image is {_by(image.stored)} as stored and {wanted} when turned "
            f"by its EXIF orientation {image.orientation}, so these labels fit only {drawn}; if all labels were drawn like "
            f"this, add --set data.exif={setting}, else turn this label map"
        )
    note = f" (turned by EXIF orientation {image.orientation})" if image.orientation != 1 else ""
    note += f"; the label map has EXIF orientation {labels.orientation}" if own else ""
    raise UserError(f"{path}: label map is {is_} but its image is {wanted}{note}; both must have the same size")


def value_counts(values: np.ndarray) -> np.ndarray:
    """Number of occurrences of each value, ``(65536,)`` int64."""
    counts = np.zeros(65536, np.int64)
    for band in bands(values):
        found = np.bincount(band.ravel())
        counts[: len(found)] += found
    return counts


def bands(values: np.ndarray) -> Iterator[np.ndarray]:
    """Split an array into bands of rows with about a million values each."""
    rows = max(1, _BAND // max(values.shape[1], 1))
    return (values[first : first + rows] for first in range(0, len(values), rows))


@contextlib.contextmanager
def opened(path: Path, kind: str, reading: Reading) -> Iterator[Image.Image]:
    """Open a file without decoding its pixels.

    Raises:
        UserError: the file has more pixels than allowed, or a decoder raised any error in the context; the message names it.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file, but a folder, a pipe or a device; give an image file")
    try:
        with _without_limit_of_pillow(), Image.open(path) as image:
            # An MPO file is a photograph followed by a preview.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                _report_frames(path, kind, image.n_frames)
            pixels = math.prod(image.size) / 1e6
            if pixels > reading.max_megapixels:
                raise UserError(
                    f"{path}: {_by(image.size)} is {pixels:.1f} megapixels, more than data.max_megapixels "
                    f"({reading.max_megapixels:g}); if the file is what you expect, add "
                    f"--set data.max_megapixels={math.ceil(pixels)}"
                )
            yield image
    except UserError:
        raise
    # A damaged file can make decoders raise anything: struct.error, ZeroDivisionError, EOFError, ...
    except Exception as error:
        raise UserError(f"{path}: cannot be read as {kind} ({str(error) or type(error).__name__})") from None


def _report_frames(path: Path, kind: str, frames: int) -> None:
    if kind == "a label map":
        raise UserError(f"{path}: label map has {frames} pages or frames; save each as a separate file")
    warnings.warn(
        f"{path}: has {frames} pages or frames; only the first is used; save the others as separate files",
        DataWarning,
        stacklevel=2,
    )


_lifting = threading.Lock()
_lifted = 0
_limit_before: int | None = None


@contextlib.contextmanager
def _without_limit_of_pillow() -> Iterator[None]:
    """Lift Pillow's limit of pixels, which is global to the process; ``data.max_megapixels`` replaces it."""
    global _lifted, _limit_before
    with _lifting:
        if _lifted == 0:
            _limit_before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _lifted += 1
    try:
        yield
    finally:
        with _lifting:
            _lifted -= 1
            if _lifted == 0 and Image.MAX_IMAGE_PIXELS is None:
                Image.MAX_IMAGE_PIXELS = _limit_before


def _shape(image: Image.Image, header: bool = False) -> Shape:
    """Size and orientation of a file before it is decoded."""
    # Avoid getexif() on such a PNG file: Pillow would decode the file to look for an orientation after the pixels.
    unseen = header and image.format == "PNG" and "exif" not in image.info
    orientation = 1 if unseen else _tag(image)
    size = image.size
    if image.format == "TIFF":
        # Some versions of Pillow return the size of the turned image.
        size = int(image.tag_v2[256]), int(image.tag_v2[257])
    return Shape(size, orientation)


def _tag(image: Image.Image) -> int:
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TURNS else 1


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _eight_bits(path: Path | str, image: Image.Image, white: float | None) -> np.ndarray:
    """Reduce grey values to ``(H, W)`` uint8: ``white`` and larger values become 255, negative values 0."""
    values = np.asarray(image)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"{path}: image contains values that are not finite (mode {image.mode}); replace them")
    if white is None:
        _check_range(path, low, high, image.mode == "F")
        white = 1.0 if image.mode == "F" else 65535
    result = np.empty(values.shape, np.uint8)
    for source, target in zip(bands(values), bands(result)):
        if white == 65535 and image.mode != "F":
            target[:] = source.clip(0, 65535) >> 8
        else:
            target[:] = (source.astype(np.float64) * (255 / white)).clip(0, 255).round()
    return result


def _check_range(path: Path | str, low: float, high: float, is_float: bool) -> None:
    """Refuse values that the default range of their type would turn black or white."""
    kind, white, dark = ("float", 1, 0.25) if is_float else ("integer", 65535, _FULL_16_BIT)
    if low < 0 or high > white or 0 < high < dark:
        raise UserError(
            f"{path}: image has {kind} values from {low:g} to {high:g}; wanted at least 0, and the brightest from {dark} to "
            f"{white}; say which value is white with data.white (4095 for 12 bits, 65535 for 16, 1 for floats up to 1), or "
            "save the image with 8 bits"
        )


def _check_upper_byte(path: Path, image: Image.Image) -> None:
    """Refuse dark 16-bit colours: Pillow keeps only the upper byte, which is almost nothing of 12 bits."""
    extrema = zip(image.getbands(), image.getextrema())
    highest = max(high for band, (_, high) in extrema if band != "A")
    if 0 < highest < _FULL_16_BIT >> 8:
        raise UserError(
            f"{path}: image has 16-bit colours that reach only about {256 * highest + 255} of 65535, as if they had 10 to 14 "
            "bits; save it with 8 bits, or add --set data.white=65535 if it is really that dark"
        )


def _unscaled(path: Path, values: np.ndarray, tile: str) -> np.ndarray:
    """Undo Pillow's stretching of 2-bit and 4-bit grey to 0..255."""
    for bits in (2, 4):
        if f"'L;{bits}'" in tile or f"'L;{bits}R'" in tile:
            return values // np.uint8(255 // (2**bits - 1))
    if any(f"'L;{form}'" in tile for form in ("I", "IR", "2I", "2IR", "4I", "4IR")):
        raise UserError(f"{path}: label map has inverted grey values (0 is white); save it as PNG")
    return values
