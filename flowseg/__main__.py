"""The command ``flowseg``, also as ``python -m flowseg``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or print one line that names the dependency that is not installed."""
    try:
        from flowseg.cli import main as run
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("flowseg", "flowseg_kernels"):
            raise
        sys.exit(
            f"error: flowseg needs {error.name}; install it with: pip install '.[train]' in a clone of the project"
        )
    run()


if __name__ == "__main__":
    main()
