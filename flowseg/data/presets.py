"""Meaning of the label values of known data sets: class names, colours, and ignored values."""

from __future__ import annotations

import colorsys
import dataclasses
import functools

from flowseg.data import class_names
from flowseg.data.paints import PAINTS as PAINT_NAMES

# Up to this number, colours are the same as in earlier versions.
_PLAIN_COLORS = 255


@dataclasses.dataclass(frozen=True)
class Labels:
    """Meaning of label values.

    Attributes:
        classes: names in the order of the class indices.
        palette: one RGB colour (0..255) per class.
        ignore: ignored values in addition to 255, or to 65535 with more than 255 classes.
        values: label value of each class in the files; ``None``: 0, 1, 2, ...
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore: tuple[int, ...] = ()
    values: tuple[int, ...] | None = None


@functools.lru_cache(maxsize=8)
def spread_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """``count`` distinct colours, none of them black, which marks ignored pixels.

    Hues are spaced by the golden ratio. The first 255 colours alternate between three levels of brightness. Later colours
    also vary in saturation, and one that is taken already moves to the next free colour.
    """
    colors: dict[tuple[int, int, int], None] = {}
    for k in range(count):
        # Multiples of 1 / r and 1 / r^2 fill the square evenly (Roberts' sequence, r^3 = r + 1).
        level = (0.75, (1.0, 0.8, 0.6)[k % 3])
        if k >= _PLAIN_COLORS:
            level = 0.3 + 0.7 * (k * 0.75487766625 % 1.0), 0.4 + 0.6 * (k * 0.56984029099 % 1.0)
        color = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(k * 0.61803398875 % 1.0, *level))
        while color in colors:
            number = (color[0] * 256 + color[1]) * 256 + color[2] + 1
            color = number >> 16 & 255, number >> 8 & 255, number & 255
        colors[color] = None
    return tuple(colors)


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours of Pascal VOC: bit ``3 j + c`` of the index is bit ``7 - j`` of channel ``c``."""
    return tuple(
        tuple(sum((k >> (3 * j + c) & 1) << (7 - j) for j in range(8)) for c in range(3)) for k in range(count)
    )


CAMVID = Labels(
    classes=(
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
    ),
    palette=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    ignore=(11,),
)  # fmt: skip

DIGITS = Labels(
    classes=("background", *(str(digit) for digit in range(10))), palette=((40, 40, 40), *spread_palette(10))
)

PAINTS = Labels(tuple(" ".join(words) for words in PAINT_NAMES), spread_palette(len(PAINT_NAMES)))

ADE20K = Labels(class_names.ADE20K, spread_palette(150), ignore=(0,), values=tuple(range(1, 151)))

_USED = tuple(k for k in range(182) if k not in class_names.COCO_STUFF_UNUSED)
COCO_STUFF = Labels(
    tuple(class_names.COCO_STUFF[k] for k in _USED),
    spread_palette(len(_USED)),
    ignore=class_names.COCO_STUFF_UNUSED,
    values=_USED,
)

CITYSCAPES = Labels(
    class_names.CITYSCAPES,
    palette=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
        (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
        (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
    ignore=tuple(k for k in range(34) if k not in class_names.CITYSCAPES_VALUES),
    values=class_names.CITYSCAPES_VALUES,
)  # fmt: skip

VOC = Labels(class_names.VOC, voc_palette(21))
