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


def last_change(*paths: str) -> str:
    """The last commit that changed any of these paths, from the root, or that they are none's."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments, "--", *paths], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    changed, last = git("status", "--porcelain", "--untracked-files=no"), git("log", "-1", "--format=%h")
    return f"{last}{CHANGED if changed else ''}" if last and changed is not None else UNKNOWN


def is_known(found: str) -> bool:
    """Whether it names one state of the sources."""
    return not found.endswith((CHANGED, UNKNOWN))
