"""Image files and label maps as arrays: the limit of pixels, the EXIF orientation and the depth are decided here, once."""

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
# Orientations 6 and 8 are the inverse of each other; every other one is its own.
_BACK = {6: 8, 8: 6}
# A 16-bit picture whose brightest value is below this was very likely written by a camera with 10, 12 or 14 bits.
_FULL_16_BIT = 2**14
# Values that are converted at once: a whole photograph in int64 would take eight times its size.
_BAND = 2**20


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read; the fields are those of the ``data`` settings."""

    exif: str = "upright"
    white: float | None = None
    max_megapixels: float = 256.0

    @classmethod
    def of(cls, config: DataConfig) -> Reading:
        """The fields of a run's settings."""
        return cls(config.exif, config.white, config.max_megapixels)


class Shape(NamedTuple):
    """Size ``(width, height)`` of the stored pixels, and the EXIF orientation (1 to 8) that says how to show them."""

    stored: tuple[int, int]
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Size as a viewer shows the picture."""
        return turned_size(self.stored, self.orientation)


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Size of a picture after it was turned by an orientation."""
    return size[::-1] if orientation >= 5 else size


def read_picture(path: Path, reading: Reading) -> tuple[Image.Image, Shape]:
    """An RGB image, turned as a viewer shows it.

    Grey, palette and alpha images are converted. Deeper ones become 8 bits: ``reading.white`` is the value that
    becomes 255. By default it is 65535 for 16 bits and 1.0 for floats.

    Raises:
        UserError: the file cannot be decoded, has too many pixels, or has values whose scale is not known.
    """
    with opened(path, "an image", reading) as image:
        # Looking for the orientation decodes a PNG file, which forgets how it was stored.
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
                f"{path}: image has 16-bit colours, whose white is 65535, and data.white is {reading.white:g}, which is for grey "
                "images; save this one with 8 bits"
            )
        # Pillow would copy a picture that is RGB already.
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        # Pillow has turned TIFF files while it decoded them.
        turn = _TURNS.get(_tag(image))
        return (picture.transpose(turn) if turn is not None else picture), shape


def as_picture(image: object, reading: Reading) -> tuple[Image.Image, Shape]:
    """An RGB image of a path, a Pillow image or an array.

    Args:
        image: a path, turned as a viewer shows it; a Pillow image of any mode, or a numpy array ``(H, W)`` or
            ``(H, W, 1 | 3 | 4)`` uint8, or ``(H, W)`` of 16 or 32 bits or floats, as it is. Alpha is dropped, and deep
            values become 8 bits as those of files do.
        reading: how files are read.

    Raises:
        UserError: it is none of these, or see :func:`read_picture`.
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
    # A lazily opened file is decoded here.
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
            # Pillow has no unsigned 32 bits.
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
    """An upright picture as it would be stored under this orientation."""
    turn = _TURNS.get(_BACK.get(orientation, orientation))
    return picture if turn is None else picture.transpose(turn)


def read_shape(path: Path, kind: str, reading: Reading) -> Shape:
    """Size and orientation from the header; the orientation of a PNG file may follow its pixels and is then not seen."""
    with opened(path, kind, reading) as image:
        return _shape(image, header=True)


def read_values(path: Path, reading: Reading) -> tuple[np.ndarray, Shape]:
    """Label values ``(H, W)`` uint8 or uint16, turned by the file's own orientation.

    Of a palette picture they are the indices, never its colours. Grey values of 1, 2 and 4 bits are the stored numbers.

    Raises:
        UserError: the file cannot be decoded, has too many pixels, several channels, or values that are no whole numbers.
    """
    with opened(path, "a label map", reading) as image:
        tile = str(image.tile)
        shape = _shape(image)
        if image.format in ("JPEG", "MPO"):
            raise UserError(f"{path}: label map is a JPEG, whose compression changes the values; save it as PNG")
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
    """An array ``(H, W)`` turned by an EXIF orientation, as a view."""
    if orientation in (5, 6, 7, 8):
        values = values.T
    across = orientation in (2, 3, 6, 7)
    down = orientation in (3, 4, 7, 8)
    return values[:: -1 if down else 1, :: -1 if across else 1]


def stored_values(values: np.ndarray, orientation: int) -> np.ndarray:
    """An upright array ``(H, W)`` as it would be stored under this orientation, as a view."""
    return turn_values(values, _BACK.get(orientation, orientation))


def turn_of_labels(path: Path, labels: Shape, image: Shape, exif: str) -> int:
    """The orientation by which a label map is turned to lie on its upright image.

    A label map with an orientation of its own is turned by that. The others were drawn on what a viewer shows
    (``exif="upright"``) or on the stored pixels (``"stored"``) of the image.

    Raises:
        UserError: the sizes disagree; it says when they would agree under the other setting.
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
            f"{path}: label map is {_by(labels.stored)}; its image is {_by(image.stored)} as stored and {wanted} as its "
            f"EXIF orientation {image.orientation} shows it, so that these labels fit {drawn} only; if all labels were "
            f"drawn so, add --set data.exif={setting}, else turn this label map"
        )
    note = f" (turned by EXIF orientation {image.orientation})" if image.orientation != 1 else ""
    note += f"; the label map has EXIF orientation {labels.orientation} itself" if own else ""
    raise UserError(f"{path}: label map is {is_} but its image is {wanted}{note}; both must have the same size")


def value_counts(values: np.ndarray) -> np.ndarray:
    """How often each value occurs, ``(65536,)`` int64."""
    counts = np.zeros(65536, np.int64)
    for band in bands(values):
        found = np.bincount(band.ravel())
        counts[: len(found)] += found
    return counts


def bands(values: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of an array, so many at a time that a band has about a million values."""
    rows = max(1, _BAND // max(values.shape[1], 1))
    return (values[first : first + rows] for first in range(0, len(values), rows))


@contextlib.contextmanager
def opened(path: Path, kind: str, reading: Reading) -> Iterator[Image.Image]:
    """An opened file whose pixels are not decoded yet.

    Raises:
        UserError: naming the file: it has more pixels than allowed, or whatever a decoder raised in the context.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file, but a folder, a pipe or a device; give an image file")
    try:
        with _without_limit_of_pillow(), Image.open(path) as image:
            # Some cameras store a preview behind the photograph.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                _tell_frames(path, kind, image.n_frames)
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
    # Decoders raise whatever a damaged file makes them run into: struct.error, ZeroDivisionError, EOFError, ...
    except Exception as error:
        raise UserError(f"{path}: cannot be read as {kind} ({str(error) or type(error).__name__})") from None


def _tell_frames(path: Path, kind: str, frames: int) -> None:
    if kind == "a label map":
        raise UserError(f"{path}: label map has {frames} pages or frames; save each as a file of its own")
    warnings.warn(
        f"{path}: has {frames} pages or frames, of which the first is taken; save the others as files of their own",
        DataWarning,
        stacklevel=2,
    )


_lifting = threading.Lock()
_lifted = 0
_limit_before: int | None = None


@contextlib.contextmanager
def _without_limit_of_pillow() -> Iterator[None]:
    """Pillow's own limit, a global of the process, is lifted while a file of ours is read; ours is a setting."""
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
    """Size and orientation of a file that is not decoded yet."""
    # Pillow decodes a PNG file to look for an orientation behind the pixels.
    unseen = header and image.format == "PNG" and "exif" not in image.info
    orientation = 1 if unseen else _tag(image)
    size = image.size
    if image.format == "TIFF":
        # Some versions of Pillow give the size of the turned picture.
        size = int(image.tag_v2[256]), int(image.tag_v2[257])
    return Shape(size, orientation)


def _tag(image: Image.Image) -> int:
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TURNS else 1


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _eight_bits(path: Path | str, image: Image.Image, white: float | None) -> np.ndarray:
    """Grey values of more than 8 bits as ``(H, W)`` uint8: ``white`` becomes 255, more is white and less than 0 black."""
    values = np.asarray(image)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"{path}: image holds values that are no numbers (mode {image.mode}); replace them")
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
    """Refuse values that the usual range of their type would turn black or white."""
    kind, white, dark = ("float", 1, 0.25) if is_float else ("integer", 65535, _FULL_16_BIT)
    if low < 0 or high > white or 0 < high < dark:
        raise UserError(
            f"{path}: image has {kind} values from {low:g} to {high:g}; wanted at least 0, and the brightest from {dark} to "
            f"{white}; say which value is white with data.white (4095 for 12 bits, 65535 for 16, 1 for floats up to 1), or "
            "save it with 8 bits"
        )


def _check_upper_byte(path: Path, image: Image.Image) -> None:
    """Pillow keeps the upper byte of 16-bit colours, which is next to nothing of 12 bits."""
    extrema = zip(image.getbands(), image.getextrema())
    highest = max(high for band, (_, high) in extrema if band != "A")
    if 0 < highest < _FULL_16_BIT >> 8:
        raise UserError(
            f"{path}: image has 16-bit colours that reach only about {256 * highest + 255} of 65535, as 10 to 14 bits in "
            "16 do; save it with 8 bits, or add --set data.white=65535 if it is really that dark"
        )


def _unscaled(path: Path, values: np.ndarray, tile: str) -> np.ndarray:
    """Grey of 2 and 4 bits as stored: Pillow stretches it to 0..255."""
    for bits in (2, 4):
        if f"'L;{bits}'" in tile or f"'L;{bits}R'" in tile:
            return values // np.uint8(255 // (2**bits - 1))
    if any(f"'L;{form}'" in tile for form in ("I", "IR", "2I", "2IR", "4I", "4IR")):
        raise UserError(f"{path}: label map has grey values in which 0 is white; save it as PNG")
    return values
