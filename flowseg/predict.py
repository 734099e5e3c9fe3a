"""Segment files: palette masks, overlays and margin maps."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flowseg.data.folder import IMAGE_SUFFIXES
from flowseg.data.pictures import Reading, read_picture, turn_back
from flowseg.errors import UserError
from flowseg.segment import Segmenter

OUTPUTS = ("mask", "overlay", "margin")


@dataclasses.dataclass
class Predictions:
    """What was written, and which inputs failed with what reason."""

    written: list[Path]
    failed: list[tuple[Path, str]]


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (their .jpg, .jpeg, .png files) and glob patterns, in order, each once.

    Raises:
        UserError: an input that matches nothing.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(text, recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(f"input {text!r}: no such file, and no images there; give files, folders or a glob pattern")
        found.update(dict.fromkeys(matches))
    return list(found)


def predict(
    segmenter: Segmenter,
    images: Sequence[Path],
    out: Path,
    palette: Sequence[tuple[int, int, int]],
    *,
    outputs: Sequence[str] = ("mask", "overlay"),
    opacity: float = 0.5,
    on_image: Callable[[Path], None] | None = None,
) -> Predictions:
    """Segment each image at its own size and write PNG files beside each other in ``out``.

    ``NAME.mask.png``: class indices with the palette. ``NAME.overlay.png``: the image under the colours.
    ``NAME.margin.png``: 8-bit grey, how much farther the second nearest code is than the nearest, as a share of the
    smallest distance between two codes; dark pixels are uncertain. They show the image as a viewer does, or as it is
    stored where ``data.exif`` is ``"stored"``: a mask lies where a label map of the same image would. A file that cannot be
    read or written is noted and the rest goes on.

    Raises:
        UserError: two inputs that would write the same file.
    """
    names = _output_names(images)
    reading = Reading.of(segmenter.config.data)
    out.mkdir(parents=True, exist_ok=True)
    result = Predictions([], [])
    for path, name in zip(images, names):
        try:
            image, shape = read_picture(path, reading)
            labels, margin = (part.numpy() for part in segmenter.labels(image, with_margin=True))
            for kind in outputs:
                picture = _picture(kind, image, labels, margin, palette, segmenter.codebook.min_distance, opacity)
                if reading.exif == "stored":
                    picture = turn_back(picture, shape.orientation)
                target = out / f"{name}.{kind}.png"
                _write(picture, target)
                result.written.append(target)
        except (UserError, OSError) as error:
            result.failed.append((path, str(error)))
        if on_image:
            on_image(path)
    return result


def colorize(labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Labels ``(H, W)`` to RGB ``(H, W, 3)`` uint8; labels without a colour are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def _picture(
    kind: str,
    image: Image.Image,
    labels: np.ndarray,
    margin: np.ndarray,
    palette: Sequence[tuple[int, int, int]],
    spacing: float,
    opacity: float,
) -> Image.Image:
    if kind == "mask":
        picture = Image.fromarray(labels.astype(np.uint8)).convert("P")
        picture.putpalette([value for color in palette for value in color])
        return picture
    if kind == "overlay":
        return Image.blend(image, Image.fromarray(colorize(labels, palette)), opacity)
    share = margin / spacing if np.isfinite(spacing) else np.ones_like(margin)
    return Image.fromarray((255 * np.clip(share, 0, 1)).round().astype(np.uint8))


def _output_names(images: Sequence[Path]) -> list[str]:
    """The stem where it is unique, else the stem with its parent folder's name before it.

    Raises:
        UserError: both are taken.
    """
    stems = [path.stem for path in images]
    names = [f"{path.parent.name}_{path.stem}" if stems.count(path.stem) > 1 else path.stem for path in images]
    for index, name in enumerate(names):
        if name in names[:index]:
            first = images[names.index(name)]
            raise UserError(
                f"{images[index]} and {first} would write the same file {name}.mask.png; predict them apart"
            )
    return names


def _write(picture: Image.Image, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
