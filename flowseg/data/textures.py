"""Textures of paints with many classes: patterns with a direction and a width, which cover about a third of a region."""

from __future__ import annotations

import dataclasses

import numpy as np

WIDTHS = {"medium": 6.5, "wide": 10.5, "fine": 4.0}
"""Distance in pixels between two stripes, or two lines or dots of a row. A region changes it by up to 8 %."""
WIDTH_RANGE = (0.92, 1.08)
STRIPES = {"upright": 0.0, "level": 90.0, "rising": 45.0, "falling": 135.0}
"""Direction of stripes, and the angle in degrees between their wave vector and the x-axis (y points down)."""
SQUARES = {"straight": 0.0, "slanted": 45.0}
TURN = 8.0
"""A region turns its pattern by up to this many degrees. Dots and nets are turned at random."""
PATTERNS: dict[str, dict[str, float] | None] = {
    "stripes": STRIPES,
    "checks": SQUARES,
    "dots": None,
    "grid": SQUARES,
    "net": None,
}
"""Name of each pattern, and its directions; ``None``: it has no direction."""
# The level of each pattern's wave above which a third of the area lies.
_LEVELS = {"stripes": 0.5, "checks": 0.2077, "dots": 0.1114, "grid": 0.8384, "net": 0.2918}


@dataclasses.dataclass(frozen=True)
class Texture:
    """A pattern with its direction (``None``: any) and its width.

    Attributes:
        pattern: a key of :data:`PATTERNS`.
        direction: a key of the pattern's directions.
        width: a key of :data:`WIDTHS`.
    """

    pattern: str
    direction: str | None
    width: str

    @property
    def name(self) -> str:
        """Such as ``"wide rising stripes"``."""
        return " ".join(word for word in (self.width, self.direction, self.pattern) if word)

    def share(self, rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Share of the second colour at each of the pixels ``(N,)``, between 0 and 1, for a random placing of the pattern."""
        if self.direction is None:
            angle = rng.uniform(0, 60)
        else:
            angle = PATTERNS[self.pattern][self.direction] + rng.uniform(-TURN, TURN)
        length = WIDTHS[self.width] * rng.uniform(*WIDTH_RANGE)
        # Dots and nets are sums of three waves, 60 degrees apart; their phases must agree.
        turns = {"stripes": (0,), "checks": (0, 90), "grid": (0, 90)}.get(self.pattern, (0, 60))
        waves = []
        for turn in turns:
            radians = np.deg2rad(angle + turn)
            along = (x * np.cos(radians) + y * np.sin(radians)) / length
            waves.append(2 * np.pi * (along + rng.uniform()))
        height = _height(self.pattern, waves)
        # The edge between the two colours is about a pixel wide.
        return ((height - _LEVELS[self.pattern]) * (length / 6) + 0.5).clip(0, 1)


def _height(pattern: str, phases: list[np.ndarray]) -> np.ndarray:
    cosines = [np.cos(phase) for phase in phases]
    if pattern == "grid":
        return np.maximum(*cosines)
    if pattern in ("dots", "net"):
        mean = (cosines[0] + cosines[1] + np.cos(phases[1] - phases[0])) / 3
        return mean if pattern == "dots" else -mean
    return sum(cosines) / len(cosines)


TEXTURES = tuple(
    Texture(pattern, direction, width)
    for width in WIDTHS
    for pattern, directions in PATTERNS.items()
    for direction in directions or (None,)
)
