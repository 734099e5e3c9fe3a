"""Files that are complete or absent: each is written under a temporary name and then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``; when the block ends, the file written there replaces ``path``.

    If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    # A cut name: the longest name that a file system permits leaves no room for the process number.
    temporary = path.with_name(f".{path.name[:32]}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, complete or not at all. ``errors`` is the error handler of :meth:`str.encode`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)
