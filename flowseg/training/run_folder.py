"""Checks of a run folder before training starts: resume or not, nobody else in there, settings that can continue the run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Literal

from flowseg.checkpoint import check_meaning, list_checkpoints, trained_steps
from flowseg.config import Config, load_config
from flowseg.data import resolve_labels
from flowseg.errors import UserError
from flowseg.runs.parallel import Ranks
from flowseg.shards import soon


def should_resume(out: Path, resume: bool | Literal["auto"]) -> bool:
    """Decide whether the run continues from a checkpoint in ``out``.

    Raises:
        UserError: ``out`` is a file, or there is no checkpoint and ``resume`` is ``True``.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    found = bool(list_checkpoints(out))
    if resume == "auto":
        return found
    if resume not in (True, False):
        raise UserError(f"resume must be True, False or 'auto', got {resume!r}")
    if resume and not found:
        raise UserError(
            f"--resume: no checkpoint in {out / 'checkpoints'}; leave --resume out to start a new run, or give "
            "--resume=auto to resume only where there is a checkpoint"
        )
    return resume


def check_same_checkpoints(out: Path, ranks: Ranks) -> None:
    """Refuse a folder in which the processes see different checkpoints. A collective.

    Raises:
        UserError: in a process that sees others than the first process; the rest raise PeerError.
    """

    def newest() -> str:
        found = list_checkpoints(out)
        return found[-1].name if found else "no checkpoint"

    seen = ranks.gather(newest())[0]
    with ranks.together():
        if not soon(lambda: newest() == seen):
            raise _not_shared(out, ranks, f"{newest()} there, process 0 {seen}")


def check_shared(out: Path, ranks: Ranks) -> None:
    """Refuse a folder in which a process does not see what the first one writes, such as a folder on local disks. A collective.

    Raises:
        UserError: in a process that does not see it; the others raise PeerError.
    """
    mark = out / f".seen.{ranks.from_first(os.getpid())}"
    try:
        with ranks.together():
            if ranks.rank == 0:
                mark.touch()
        with ranks.together():
            if not soon(mark.exists):
                raise _not_shared(out, ranks, "no file that process 0 writes there (train.checkpoint=sharded)")
    finally:
        if ranks.rank == 0:
            mark.unlink(missing_ok=True)


def _not_shared(out: Path, ranks: Ranks, what: str) -> UserError:
    return UserError(
        f"--out {out}: process {ranks.rank}, on {os.uname().nodename}, sees {what}; give a folder on a file system that all "
        "machines share"
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other trainers out of the folder until the block ends or the process dies. Create the folder if it is missing.

    Raises:
        UserError: another trainer uses the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems cannot lock a folder; training goes on without the lock there.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise UserError(f"--out {out}: another process trains there; wait for it, or give another folder") from None
    # A loader's worker may outlive a killed trainer by seconds: it closes its copy of the handle, which would keep the lock.
    holder = {handle}
    register_after_fork(holder, lambda handles: os.close(*handles))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(holder.pop())
        # Remove the folder if the run failed before writing anything.
        with contextlib.suppress(OSError):
            out.rmdir()


def check_steps_left(config: Config, out: Path) -> None:
    """Refuse to resume a run that has done more than ``train.steps`` steps.

    Raises:
        UserError: naming both numbers.
    """
    done = trained_steps(out)
    if done is not None and done > config.train.steps:
        raise UserError(f"train.steps is {config.train.steps}, but the run has done {done} steps; give at least {done}")


def check_same_meaning(config: Config, out: Path) -> None:
    """Refuse to resume with other classes, codes or another network than the run was trained with.

    Raises:
        UserError: naming the setting.
    """
    if not (out / "config.yaml").is_file():
        return
    before = load_config(out / "config.yaml")
    old, new = (resolve_labels(settings.data).classes for settings in (before, config))
    if old != new:
        raise UserError(
            f"--resume: {out} learnt {len(old)} classes, {_listed(old)}; data.classes has {len(new)}, {_listed(new)}; "
            "give a new --out"
        )
    check_meaning(before, config, out)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)
