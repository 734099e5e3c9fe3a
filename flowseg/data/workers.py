"""Worker processes of a loader: how many, how they start, and what it means when one dies."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
import sys
from pathlib import Path

import torch

from flowseg.config import Config, DataConfig
from flowseg.errors import UserError
from flowseg.label_kinds import label_kind
from flowseg.runs.machine import cores_per_process, local_processes

MOST_WORKERS = 8
"""Largest automatic number of workers per process."""

BATCHES_AHEAD = 2
"""Batches that each worker prepares in advance."""

SHARED_MEMORY = Path("/dev/shm")
"""File system through which workers send batches. Docker gives it 64 MB unless told otherwise."""


def worker_count(config: Config) -> int:
    """The number of workers that ``data.workers`` asks for.

    The automatic number is 0 without a GPU. With a GPU it is the number of cores that each training process of this machine
    can use, from 1 to 8, or fewer if the batches that wait for their turn would fill the shared memory.
    """
    if config.data.workers is not None:
        return config.data.workers
    # A daemonic process, such as one of a multiprocessing.Pool, may not start others.
    can_start = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if not torch.cuda.is_available() or not can_start:
        return 0
    workers = min(MOST_WORKERS, cores_per_process())
    if SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(SHARED_MEMORY).free // local_processes()
        workers = min(workers, room // (BATCHES_AHEAD * _batch_bytes(config)))
    return workers


def _batch_bytes(config: Config) -> int:
    """Memory of a batch: an image of three bytes per pixel, a label, and the noise of a noise source."""
    # No preset has more than 255 classes.
    label = label_kind(config.data.num_classes or len(config.data.classes or ())).dtype.itemsize
    pixel = 3 + label + (4 * config.codes.channels if config.flow.source == "noise" else 0)
    return config.train.batch_size * config.data.height * config.data.width * pixel


def start_method() -> str:
    """How workers start: by fork on Linux, unless the program has chosen another start method.

    A forked worker does not import the script again, so a script may call ``train()`` without an ``if __name__ == "__main__"``
    guard, in a notebook too. Python 3.14 starts processes by ``forkserver`` if nothing is chosen.
    """
    # The first method is Python's default. Creating a queue records the default as if it were chosen.
    default = multiprocessing.get_all_start_methods()[0]
    chosen = multiprocessing.get_start_method(allow_none=True) or default
    return "fork" if sys.platform == "linux" and chosen == default else chosen


def lost_worker(error: Exception, workers: int, config: DataConfig) -> UserError | None:
    """The error to show if ``error`` of a loader means that a worker could not start or died; else ``None``."""
    text = "".join(str(error).splitlines()[:1])
    # An error that a worker has caught arrives with its own type: it is no death.
    if text.startswith("Caught "):
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE):
        event = "could not start"
    elif isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in text:
        # A worker that dies while it sends a batch breaks the connection.
        event = "died"
    else:
        return None
    automatic = ", the automatic number," if config.workers is None else ""
    guard = (
        f"; workers start by {start_method()}, which imports your script again: call train() under "
        "if __name__ == '__main__'"
    )
    return UserError(
        f"data.workers: a worker process {event} ({text}); it may have run out of memory: give fewer than {workers} "
        f"workers{automatic} or smaller images, then --resume{guard if start_method() != 'fork' else ''}"
    )
