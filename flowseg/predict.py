"""Segment files: palette masks, overlays and margin maps."""

from __future__ import annotations

import dataclasses
import glob
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from flowseg.data.files import IMAGE_SUFFIXES, by_suffix, list_files, name_left_out
from flowseg.data.pictures import Reading, read_picture, turn_back
from flowseg.errors import DataWarning, UserError
from flowseg.runs.memory import is_out_of_memory
from flowseg.segment import Segmenter

OUTPUTS = ("mask", "overlay", "margin")
# Rows that are coloured at once: a photograph in floats would take many times its size.
_ROWS = 256


@dataclasses.dataclass
class Predictions:
    """What was written, and which inputs failed with what reason."""

    written: list[Path]
    failed: list[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class Input:
    """An image file, and the sub-folder of the output folder in which its pictures go."""

    path: Path
    place: Path = Path()


def find_inputs(inputs: Sequence[str]) -> list[Input]:
    """Files named by paths, folders (their image files, those of sub-folders too) and glob patterns, in order, each once.

    Pictures of a sub-folder's images go into a sub-folder of the same name. Hidden files and what :func:`predict` itself
    writes (``NAME.mask.png`` and so on) are passed over. A :class:`DataWarning` names files that are left out.

    Raises:
        UserError: an input that matches nothing.
    """
    found: dict[str, Input] = {}
    own: list[Path] = []
    for text in inputs:
        path = Path(text)
        there = ""
        if _is(path.is_dir):
            files, others = list_files(path, IMAGE_SUFFIXES)
            name_left_out(path, others, IMAGE_SUFFIXES)
            matches = [Input(file, file.parent.relative_to(path)) for file in files]
            there = f"; there are only {by_suffix(others)}" if others else ""
        else:
            matches = [Input(file) for file in ([path] if _is(path.exists) else _glob(text))]
        if not matches:
            raise UserError(
                f"input {text!r}: no such file, and no images there; give files, folders or a glob pattern{there}"
            )
        for match in matches:
            if is_own_output(match.path):
                own.append(match.path)
            else:
                found.setdefault(os.path.abspath(match.path), match)
    if own:
        said = f"files with names that predictions have, such as {own[0]}"
        if not found:
            raise UserError(f"inputs: there are only {said}; give images, or rename them")
        warnings.warn(f"{len(own)} {said}, are left out", DataWarning, stacklevel=2)
    return list(found.values())


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The files of :func:`find_inputs`."""
    return [found.path for found in find_inputs(inputs)]


def is_own_output(path: Path) -> bool:
    """Whether a file has a name that :func:`predict` gives."""
    return path.name.lower().endswith(tuple(f".{kind}.png" for kind in OUTPUTS))


def predict(
    segmenter: Segmenter,
    images: Sequence[Path | Input],
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
    stored where ``data.exif`` is ``"stored"``: a mask lies where a label map of the same image would.

    A file that cannot be read, segmented within the memory or written is noted, and the rest goes on. :func:`output_names`
    says what NAME is.
    """
    inputs = [image if isinstance(image, Input) else Input(Path(image)) for image in images]
    result = Predictions([], [])
    out.mkdir(parents=True, exist_ok=True)
    for one, name in zip(inputs, output_names(inputs)):
        try:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            for kind, picture in _pictures(segmenter, one.path, outputs, palette, opacity):
                target = out / name.with_name(f"{name.name}.{kind}.png")
                _write(picture, target)
                result.written.append(target)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "does not fit into memory; segment it in windows, with --set sample.window=slide"
            result.failed.append((one.path, f"{one.path}: {reason}"))
        except (UserError, OSError, ValueError) as error:
            result.failed.append((one.path, str(error)))
        if on_image:
            on_image(one.path)
    return result


def output_names(inputs: Sequence[Input]) -> list[Path]:
    """Where the pictures of each input go, below the output folder and without ``.KIND.png``: all distinct.

    The name is the file's stem. Inputs that would then share it take, all of them, the first of these that tells them
    apart: with their folder's name in front (``FOLDER_STEM``), with their suffix (``STEM.jpg``), with both, with the
    names of two folders, of three, a number.
    """
    # Disks of some systems do not tell capitals from small letters.
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(inputs):
        groups.setdefault(_folded(one.place / one.path.stem), []).append(index)
    alone = [same[0] for same in groups.values() if len(same) == 1]
    names: dict[int, Path] = {index: inputs[index].place / inputs[index].path.stem for index in alone}
    taken = set(map(_folded, names.values()))
    for same in groups.values():
        if len(same) > 1:
            chosen = _distinct([inputs[index] for index in same], taken)
            names.update(zip(same, chosen))
            taken.update(map(_folded, chosen))
    return [names[index] for index in range(len(inputs))]


def _folded(name: Path) -> str:
    return str(name).casefold()


def _distinct(inputs: Sequence[Input], taken: set[str]) -> list[Path]:
    def named(one: Input, folders: int, suffix: bool) -> str:
        parents = one.path.absolute().parts[1:-1]
        return "_".join([*parents[len(parents) - folders :], one.path.name if suffix else one.path.stem])

    for folders, suffix in ((1, False), (0, True), (1, True), (2, False), (2, True), (3, False), (3, True)):
        names = [one.place / named(one, folders, suffix) for one in inputs]
        folded = set(map(_folded, names))
        if len(folded) == len(names) and not taken.intersection(folded):
            return names
    names, number = [], 0
    for one in inputs:
        while _folded(name := one.place / f"{one.path.name}-{number}") in taken:
            number += 1
        names.append(name)
        number += 1
    return names


def colorize(labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Labels ``(H, W)`` to RGB ``(H, W, 3)`` uint8; labels without a colour are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def _pictures(
    segmenter: Segmenter, path: Path, outputs: Sequence[str], palette: Sequence[tuple[int, int, int]], opacity: float
):
    """Kind and picture of each output of a file."""
    reading = Reading.of(segmenter.config.data)
    image, shape = read_picture(path, reading)
    labels, margin = (
        segmenter.labels(image, with_margin=True) if "margin" in outputs else (segmenter.labels(image), None)
    )
    for kind in dict.fromkeys(outputs):
        if kind == "mask":
            picture = _mask(labels.numpy(), palette)
        elif kind == "overlay":
            _paint_over(image, labels.numpy(), palette, opacity)
            picture = image
        else:
            picture = _margin(margin, segmenter.codebook.min_distance)
        yield kind, turn_back(picture, shape.orientation) if reading.exif == "stored" else picture


def _mask(labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette([value for color in palette for value in color])
    return picture


def _paint_over(
    image: Image.Image, labels: np.ndarray, palette: Sequence[tuple[int, int, int]], opacity: float
) -> None:
    """Blend the labels' colours into the image itself: an aerial image may not fit into memory twice."""
    for top in range(0, image.height, _ROWS):
        box = (0, top, image.width, min(top + _ROWS, image.height))
        colors = Image.fromarray(colorize(labels[box[1] : box[3]], palette))
        image.paste(Image.blend(image.crop(box), colors, opacity), box)


def _margin(margin: Tensor, spacing: float) -> Image.Image:
    if not np.isfinite(spacing):
        return Image.new("L", margin.shape[::-1], 255)
    picture = np.empty(margin.shape, np.uint8)
    for top in range(0, len(margin), _ROWS):
        share = np.clip(np.nan_to_num(margin[top : top + _ROWS].numpy() / spacing), 0, 1)
        picture[top : top + _ROWS] = (255 * share).round()
    return Image.fromarray(picture)


def _is(question: Callable[[], bool]) -> bool:
    # A text that no path can be, such as one with a null byte.
    try:
        return question()
    except (OSError, ValueError):
        return False


def _glob(pattern: str) -> list[Path]:
    try:
        matches = (Path(match) for match in glob.glob(pattern, recursive=True))
        return sorted(path for path in matches if path.is_file() and not path.name.startswith("."))
    except (OSError, ValueError):
        return []


def _write(picture: Image.Image, target: Path) -> None:
    # The longest name that a folder takes leaves no room for more letters.
    temporary = target.with_name(f".flowseg.{os.getpid()}")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
