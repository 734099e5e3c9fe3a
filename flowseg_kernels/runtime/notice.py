"""One line on stderr about missing kernels, once per process and not again in the processes that it starts."""

from __future__ import annotations

import os
import sys

from . import settings

__all__ = ["say"]

#: Number of this process among its peers, set by torchrun, srun and mpirun: the first one speaks for all.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def say(text: str) -> None:
    """Print a line unless one was printed, FLOWSEG_NOTICE=0 is set, or a backend was chosen by an environment variable."""
    chosen = settings.DEFAULT_BACKEND or settings.DISABLE_EXTENSION
    # Read anew, not taken from settings: saying it sets the variable.
    silenced = os.environ.get("FLOWSEG_NOTICE", "1") == "0"
    if chosen or silenced or any(os.environ.get(rank, "0") != "0" for rank in _RANKS):
        return
    os.environ["FLOWSEG_NOTICE"] = "0"
    if sys.stderr is not None:
        print(f"flowseg-kernels: {text} (FLOWSEG_NOTICE=0 silences this line)", file=sys.stderr, flush=True)
