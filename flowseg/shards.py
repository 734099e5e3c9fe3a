"""Tensors in a folder of safetensors files, one per process, through ``torch.distributed.checkpoint``.

Any number of processes, with tensors sharded in any way, can read the folder. The format is that of
``HuggingFaceStorageWriter``: the default format contains pickles, which could run code when they are read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flowseg.errors import UserError
from flowseg.runs.parallel import Ranks

LIST = "shards.json"
"""File with the size and the SHA-256 of each shard, written when all shards are."""

SECONDS_TO_APPEAR = 60.0
"""Time for a new file of one machine to be visible on the others. NFS may show an old listing of a folder for that long."""


def write_shards(place: Path, folders: dict[str, dict[str, Tensor]], ranks: Ranks) -> None:
    """Write each dictionary of tensors to its folder in ``place``, each process its shards. A collective.

    Copies that all processes have are divided among them. Every file is flushed to the disk.

    Args:
        place: folder that all processes see.
        folders: names of folders to tensors, the same names in every process.
        ranks: the processes.

    Raises:
        OSError: this process cannot write. The others raise PeerError.
    """
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.HuggingFaceStorageWriter):
        """Note the names of the files that this process writes."""

        def write_data(self, plan: Any, planner: Any) -> Any:
            done = super().write_data(plan, planner)
            names.update(f"{folder}/{result.storage_data.relative_path}" for result in done.wait())
            return done

    names: set[str] = set()
    for folder, tensors in folders.items():
        writer = Writer(str(place / folder), save_distributed=True)
        with _failing_together(ranks):
            dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
    mine: dict[str, list] = {}
    with ranks.together():
        mine = {name: _facts(place / name) for name in names}
    files = {name: facts for part in ranks.gather(mine) for name, facts in part.items()}
    with ranks.together():
        if ranks.rank == 0:
            missing = [name for name in files if not soon((place / name).exists)]
            if missing:
                raise FileNotFoundError(errno.ENOENT, f"another process wrote it, but it is not here: {missing[0]}")
            with (place / LIST).open("w", encoding="utf-8") as file:
                file.write(json.dumps({"files": files, "sha256": _digest(files)}, indent=1))
                file.flush()
                os.fsync(file.fileno())


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Read the whole tensors of a folder of :func:`write_shards` in one process, and verify the files.

    Raises:
        UserError: a file is missing or damaged.
    """
    alone = Ranks(1)
    verify_shards(folder.parent, [folder.name], alone)
    entries = _entries(folder).items()
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
    fill_from_shards(folder, tensors, alone)
    return tensors


def fill_from_shards(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Read tensors, sharded in any way, in place from a folder of :func:`write_shards` that is verified. A collective."""
    import torch.distributed.checkpoint as dcp

    with _failing_together(ranks), warnings.catch_warnings():
        # One process alone may read.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.world == 1)


def verify_shards(place: Path, folders: list[str], ranks: Ranks) -> None:
    """Compare the files of ``folders`` with the list, and their content with its checksums. A collective.

    Each process reads a part of the files.

    Raises:
        UserError: a file is missing, damaged or not listed. The other processes raise PeerError.
    """
    with ranks.together():
        files = _listed(place / LIST)
        wanted = {name for name in files if name.split("/")[0] in folders}
        found = {f"{folder}/{file.name}" for folder in folders for file in (place / folder).glob("*")}
        for name in sorted(wanted ^ found):
            raise UserError(f"{place / name}: {'missing' if name in wanted else 'not listed in ' + LIST}")
        for name in sorted(wanted)[ranks.rank :: ranks.world]:
            if _facts(place / name) != files[name]:
                raise UserError(f"{place / name}: damaged, checksum mismatch; use another checkpoint")


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the whole tensors in a folder of :func:`write_shards`.

    Raises:
        UserError: a file cannot be read.
    """
    return {name: entry.size for name, entry in _entries(folder).items()}


def soon(condition: Callable[[], bool]) -> bool:
    """Whether a condition on files of another machine holds now or within ``SECONDS_TO_APPEAR``."""
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextlib.contextmanager
def _failing_together(ranks: Ranks) -> Iterator[None]:
    """Run a call of ``torch.distributed.checkpoint``, which fails in all processes if it fails in one.

    Raises:
        Exception: the cause, in the first process that has one.
        PeerError: in all other processes.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    failure = None
    try:
        yield
    except CheckpointException as error:
        first = min(error.failures)
        failure = error.failures[first][0] if first == ranks.rank else None
    ranks.agree(failure)


def _entries(folder: Path) -> dict[str, Any]:
    """Names and descriptions of the tensors, from the headers of all files."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be read as safetensors ({error})") from None


def _listed(path: Path) -> dict[str, list]:
    """Names of the files to their sizes and checksums."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if listed["sha256"] != _digest(listed["files"]):
            raise ValueError("checksum mismatch")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); use another checkpoint") from None
    return listed["files"]


def _facts(path: Path) -> list:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        return [file.tell(), digest.hexdigest()]


def _digest(files: dict[str, list]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
