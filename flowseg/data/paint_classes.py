"""Classes of paints above 48: a colour, a texture and the colour of the texture give up to 69,120 of them.

Class k has the colour ``k % 288``; the quotient gives the texture, and then the colour of the texture. With up to 288 classes
the texture is random. Above 288, class k means the same with every number of classes.
"""

from __future__ import annotations

import colorsys
import functools
import itertools

import numpy as np

from flowseg.data.textures import TEXTURES

HUES = (
    "red", "vermilion", "orange", "amber", "yellow", "chartreuse", "lime", "leaf", "green", "emerald", "mint", "turquoise",
    "cyan", "sky", "azure", "cobalt", "blue", "indigo", "violet", "purple", "magenta", "fuchsia", "rose", "crimson",
)  # fmt: skip
SATURATIONS = {"pale": 0.3, "soft": 0.6, "strong": 0.9}
BRIGHTNESSES = {"dark": 0.36, "dim": 0.54, "clear": 0.72, "light": 0.9}
COLORS = tuple(itertools.product(BRIGHTNESSES, SATURATIONS, HUES))
SPREAD = (0.4, 0.1, 0.06)
"""Largest deviation of a region's hue (as a share of the distance between hues), saturation and brightness."""
SHADE = (0.5, 0.6)
"""Brightness of a darker shade, as a share of the colour's brightness."""
NEUTRAL = {"black": 0.05, "white": 0.97}
"""Colours of textures that have no hue, and their grey values."""
TURNS = (12, 8, 16, 4, 20)
"""Distances, in hues, of the bright colours of textures from the hue of the region."""
SECONDS = 1 + len(NEUTRAL) + len(TURNS)
"""Number of colours that a texture can have: a darker shade of the region's colour, black, white, or a bright colour."""


def _parts(label: int) -> tuple[int, int, int]:
    """Numbers of the colour, of the texture and of the texture's colour of a class."""
    rest, color = divmod(label, len(COLORS))
    second, texture = divmod(rest, len(TEXTURES))
    return color, texture, second


def _has_texture(num_classes: int) -> bool:
    return num_classes > len(COLORS)


def _turned(hue: str, second: int) -> int:
    """Number of the hue of a texture's bright colour."""
    return (HUES.index(hue) + TURNS[second - 1 - len(NEUTRAL)]) % len(HUES)


@functools.cache
def textured_names(num_classes: int) -> tuple[str, ...]:
    """Names such as "dim soft azure" or "dim soft azure, wide rising stripes in white"; the stripes of most classes are darker."""
    names = []
    for label in range(num_classes):
        color, texture, second = _parts(label)
        name = " ".join(COLORS[color])
        if _has_texture(num_classes):
            name += f", {TEXTURES[texture].name}"
        if second:
            neutral = second - 1 < len(NEUTRAL)
            name += (
                f" in {list(NEUTRAL)[second - 1] if neutral else f'bright {HUES[_turned(COLORS[color][2], second)]}'}"
            )
        names.append(name)
    return tuple(names)


def textured(rng: np.random.Generator, label: int, num_classes: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Colours ``(N, 3)`` in [0, 1] of the pixels ``(N,)`` of one region of a class, without noise."""
    color, texture, second = _parts(label)
    brightness, saturation, hue = COLORS[color]
    turn, more_saturation, more_brightness = rng.uniform(-1, 1, 3) * SPREAD
    ground = _rgb(
        HUES.index(hue) + turn, SATURATIONS[saturation] + more_saturation, BRIGHTNESSES[brightness] + more_brightness
    )
    shade = rng.uniform(*SHADE)
    if not _has_texture(num_classes):
        texture = int(rng.integers(len(TEXTURES)))
    if second == 0:
        other = shade * ground
    elif second - 1 < len(NEUTRAL):
        other = np.full(3, list(NEUTRAL.values())[second - 1], np.float32)
    else:
        other = _rgb(_turned(hue, second) + turn, 0.9, 0.9)
    share = TEXTURES[texture].share(rng, y, x)[:, None]
    return (1 - share) * ground + share * other


def _rgb(hue: float, saturation: float, brightness: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue / len(HUES) % 1.0, saturation, brightness), np.float32)
