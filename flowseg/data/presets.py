"""Class names, colours and ignored label values of known data sets."""

from __future__ import annotations

import colorsys
import dataclasses


@dataclasses.dataclass(frozen=True)
class Labels:
    """What label values mean.

    Attributes:
        classes: names; label value ``k`` is ``classes[k]``.
        palette: one RGB colour (0..255) a class.
        ignore: values without a class, besides 255.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore: tuple[int, ...] = ()


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


def spread_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """``count`` colours: hues by the golden ratio, three brightness levels in turn."""
    colors = []
    for k in range(count):
        rgb = colorsys.hsv_to_rgb(k * 0.61803398875 % 1.0, 0.75, (1.0, 0.8, 0.6)[k % 3])
        colors.append(tuple(round(255 * value) for value in rgb))
    return tuple(colors)


DIGITS = Labels(
    classes=("background", *(str(digit) for digit in range(10))), palette=((40, 40, 40), *spread_palette(10))
)
