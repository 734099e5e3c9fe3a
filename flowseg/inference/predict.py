"""Segment image files: write palette masks, overlays and margin maps."""

from __future__ import annotations

import dataclasses
import glob
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from flowseg.data.files import IMAGE_SUFFIXES, counts_by_suffix, list_files, warn_of_other_suffixes
from flowseg.data.pictures import Reading, read_picture, turn_back
from flowseg.errors import DataWarning, UserError
from flowseg.label_kinds import BYTES, kind_of, label_kind
from flowseg.runs.files import replacing
from flowseg.runs.memory import is_out_of_memory

if TYPE_CHECKING:
    # segment imports inference.views; a second import in the other direction would make the packages circular.
    from flowseg.segment import Segmenter

# Number of rows to colour at a time: a whole photograph in floats would take many times its size.
_ROWS = 256


@dataclasses.dataclass
class Predictions:
    """The written files, and the inputs that failed, each with the reason."""

    written: list[Path]
    failed: list[tuple[Path, str]]


@dataclasses.dataclass(frozen=True)
class Input:
    """An image file, and the sub-folder of the output folder for its results."""

    path: Path
    place: Path = Path()


def find_inputs(inputs: Sequence[str]) -> list[Input]:
    """Find the image files of paths, folders (with sub-folders) and glob patterns, in order and each once.

    Results for a sub-folder go to a sub-folder of the same name. Hidden files and results of :func:`predict`
    (``NAME.mask.png`` and so on) are skipped. A :class:`DataWarning` names other files that are left out.

    Raises:
        UserError: an input matches nothing.
    """
    found: dict[str, Input] = {}
    results: list[Path] = []
    for text in inputs:
        path = Path(text)
        present = ""
        if _is(path.is_dir):
            files, others = list_files(path, IMAGE_SUFFIXES)
            warn_of_other_suffixes(path, others, IMAGE_SUFFIXES)
            matches = [Input(file, file.parent.relative_to(path)) for file in files]
            present = f"; there are only {counts_by_suffix(others)}" if others else ""
        else:
            matches = [Input(file) for file in ([path] if _is(path.exists) else _glob(text))]
        if not matches:
            raise UserError(
                f"input {text!r}: no such file, and no images there; give files, folders or a glob pattern{present}"
            )
        for match in matches:
            if is_own_output(match.path):
                results.append(match.path)
            else:
                found.setdefault(os.path.abspath(match.path), match)
    if results:
        reason = f"files with names that predictions have, such as {results[0]}"
        if not found:
            raise UserError(f"inputs: there are only {reason}; give images, or rename these files")
        warnings.warn(f"{len(results)} {reason}, are left out", DataWarning, stacklevel=2)
    return list(found.values())


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Paths of the files that :func:`find_inputs` finds."""
    return [found.path for found in find_inputs(inputs)]


def is_own_output(path: Path) -> bool:
    """Whether a file has the name of a result of :func:`predict`."""
    return path.name.lower().endswith((".mask.png", ".overlay.png", ".margin.png"))


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
    """Segment each image at its own size and write PNG files to ``out``.

    ``NAME.mask.png``: class indices with the palette, in 8 bits; with more than 255 classes in 16 bits, grey, and 65535 for no
    class. ``NAME.overlay.png``: the colours blended over the image.
    ``NAME.margin.png``: 8-bit grey, how much farther the second nearest code is than the nearest, as a share of the
    smallest distance between two codes; dark pixels are uncertain. :func:`output_names` chooses NAME.

    The results are turned like label maps of the same image: as a viewer shows the image or, with ``data.exif`` set to
    ``"stored"``, as its pixels are stored.

    A file that cannot be read or written, or needs too much memory, is reported in the result; the others are segmented.

    Args:
        segmenter: the network with its sampling settings.
        images: image files.
        out: output folder; it is created if missing.
        palette: one RGB colour per class.
        outputs: any of ``"mask"``, ``"overlay"`` and ``"margin"``.
        opacity: opacity of the colours in overlays.
        on_image: called with the path of each finished image.
    """
    palette = np.asarray(palette, np.uint8)
    inputs = [image if isinstance(image, Input) else Input(Path(image)) for image in images]
    result = Predictions([], [])
    out.mkdir(parents=True, exist_ok=True)
    for one, name in zip(inputs, output_names(inputs)):
        try:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            for kind, picture in _pictures(segmenter, one.path, outputs, palette, opacity):
                target = out / name.with_name(f"{name.name}.{kind}.png")
                with replacing(target) as temporary:
                    picture.save(temporary, format="PNG")
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
    """Choose distinct names for the results of all inputs: paths below the output folder, without ``.mask.png`` and so on.

    The name is the stem of the file. Inputs with equal stems all get the first of these forms that makes them distinct:
    with the folder's name (``FOLDER_STEM``), with the suffix (``STEM.jpg``), with both, with the names of two folders, of
    three folders, or with a number.
    """
    # Names are compared without case: some file systems ignore it.
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(inputs):
        groups.setdefault(_folded(one.place / one.path.stem), []).append(index)
    unique = [same[0] for same in groups.values() if len(same) == 1]
    names: dict[int, Path] = {index: inputs[index].place / inputs[index].path.stem for index in unique}
    used = set(map(_folded, names.values()))
    for same in groups.values():
        if len(same) > 1:
            chosen = _distinct([inputs[index] for index in same], used)
            names.update(zip(same, chosen))
            used.update(map(_folded, chosen))
    return [names[index] for index in range(len(inputs))]


def _folded(name: Path) -> str:
    return str(name).casefold()


def _distinct(inputs: Sequence[Input], used: set[str]) -> list[Path]:
    def named(one: Input, folders: int, suffix: bool) -> str:
        parents = one.path.absolute().parts[1:-1]
        return "_".join([*parents[len(parents) - folders :], one.path.name if suffix else one.path.stem])

    for folders, suffix in ((1, False), (0, True), (1, True), (2, False), (2, True), (3, False), (3, True)):
        names = [one.place / named(one, folders, suffix) for one in inputs]
        folded = set(map(_folded, names))
        if len(folded) == len(names) and not used.intersection(folded):
            return names
    names, number = [], 0
    for one in inputs:
        while _folded(name := one.place / f"{one.path.name}-{number}") in used:
            number += 1
        names.append(name)
        number += 1
    return names


def colorize(labels: np.ndarray, palette: Sequence[tuple[int, int, int]] | np.ndarray) -> np.ndarray:
    """Convert labels ``(H, W)`` to RGB ``(H, W, 3)`` uint8; labels without a colour become black."""
    table = np.zeros((label_kind(len(palette)).ignore + 1, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def _pictures(segmenter: Segmenter, path: Path, outputs: Sequence[str], palette: np.ndarray, opacity: float):
    """Generate ``(output, picture)`` for each requested output of one file."""
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


def _mask(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    kind = kind_of(labels)
    picture = Image.fromarray(labels.astype(kind.stored, copy=False))
    if kind is BYTES:
        picture = picture.convert("P")
        picture.putpalette(palette.flatten().tolist())
    return picture


def _paint_over(image: Image.Image, labels: np.ndarray, palette: np.ndarray, opacity: float) -> None:
    """Blend the colours of the labels into the image, in place: an aerial image may not fit into memory twice."""
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
    # Some texts cannot be a path, such as one with a null byte.
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
