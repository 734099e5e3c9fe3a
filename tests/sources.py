"""Which sources a recorded run was of."""

from __future__ import annotations

import pathlib
import subprocess

from .native import ROOT

CHANGED, UNKNOWN = " with uncommitted changes", "unknown"


def commit(*written: pathlib.Path) -> str:
    """The commit of the tracked files, or that they are none's; files that the run itself writes do not count."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    others = [f":(exclude){path.relative_to(ROOT)}" for path in written]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return UNKNOWN if changed is None else f"{git('rev-parse', '--short', 'HEAD')}{CHANGED if changed else ''}"


def is_known(found: str) -> bool:
    """Whether it names one state of the sources."""
    return not found.endswith((CHANGED, UNKNOWN))
