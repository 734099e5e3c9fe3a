"""Environment variables, read once at import. They are listed in docs/environment.md."""

from __future__ import annotations

import os

__all__ = ["DEFAULT_BACKEND", "DISABLE_EXTENSION"]

#: Backend asked for in the whole process ("reference", "cpu", "triton" or "cuda"); empty: chosen for each op.
DEFAULT_BACKEND: str = os.environ.get("FLOWSEG_BACKEND", "").strip().lower()

#: Set to 1 to leave the compiled extension unloaded, for example to look for the cause of a crash.
DISABLE_EXTENSION: bool = os.environ.get("FLOWSEG_DISABLE_EXTENSION", "0") == "1"
