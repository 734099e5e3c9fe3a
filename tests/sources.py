"""The commit that a recorded run belongs to."""

from __future__ import annotations

import pathlib
import subprocess

from .native import ROOT

CHANGED, UNKNOWN = " with uncommitted changes", "unknown"


def commit(*written: pathlib.Path) -> str:
    """The commit of the tree, and whether tracked files differ from it; the files that the run itself writes do not count."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    others = [f":(exclude){path.relative_to(ROOT)}" for path in written]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return UNKNOWN if changed is None else f"{git('rev-parse', '--short', 'HEAD')}{CHANGED if changed else ''}"


def last_change(*paths: str) -> str:
    """The last commit that changed any of these paths, and whether they differ from it. Paths are relative to the root."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments, "--", *paths], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    changed, last = git("status", "--porcelain", "--untracked-files=no"), git("log", "-1", "--format=%h")
    return f"{last}{CHANGED if changed else ''}" if last and changed is not None else UNKNOWN


def is_known(found: str) -> bool:
    """Whether `commit` or `last_change` found a commit without changes."""
    return not found.endswith((CHANGED, UNKNOWN))
