"""Which backend an op takes on a GPU when several can run, and on what grounds: stored measurements, not taste.

preferences.json holds for each op the order of the backends and the reason, which `python -m flowseg_kernels.info` prints.
`python -m bench preferences` writes it: from the stored times of a GPU, and until there are any from static counts of instructions.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

__all__ = ["gpu_preference"]


@functools.cache
def _stored() -> dict[str, dict]:
    return json.loads(Path(__file__).with_suffix(".json").read_text())


def gpu_preference(op: str) -> tuple[tuple[str, ...], str]:
    """(backends in the order to try on a GPU, why) of an op; a backward has its forward's, so that one backend runs both."""
    found = _stored().get(op.removesuffix("_bwd"))
    return (tuple(found["order"]), found["because"]) if found else ((), "")
