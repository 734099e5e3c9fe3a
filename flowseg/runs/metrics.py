"""``metrics.jsonl``, one JSON object per line: the only reader and writer. A resumed run appends to it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowseg.errors import UserError
from flowseg.runs.files import write_whole


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all lines, except one that a killed process left unfinished.

    Raises:
        OSError: the file cannot be read.
    """
    lines = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [fields for fields in lines if fields is not None]


def truncate_metrics(path: Path, *, step: int, validated: int) -> None:
    """Drop the lines after ``step``, and validations after the step ``validated``: a resumed run repeats them."""
    if path.is_file():
        last = {"validation": validated}
        kept = [line for line in read_metrics(path) if line["step"] <= last.get(line["event"], step)]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
        return fields if isinstance(fields["event"], str) and math.isfinite(fields["step"]) else None
    except (ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def open_metrics(path: Path, accelerator: Accelerator) -> Iterator[Callable[..., None]]:
    """Give a function that appends its keyword arguments as one line and sends them to the trackers.

    Only the first process writes.

    Args:
        path: the metrics file.
        accelerator: owner of the trackers.
    """
    if not accelerator.is_main_process:
        yield lambda **_: None
        return
    with path.open("a", encoding="utf-8") as file:

        def log(**fields: Any) -> None:
            try:
                file.write(json.dumps(fields) + "\n")
                file.flush()
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be written ({error.strerror}); free disk space, then --resume"
                ) from None
            log_to_trackers(accelerator, fields)

        yield log


def log_to_trackers(accelerator: Accelerator, fields: dict[str, Any]) -> None:
    """Send one line of the metrics to the trackers, if there are any."""
    if accelerator.trackers:
        event, step = fields["event"], fields["step"]
        values = {f"{event}/{name}": value for name, value in fields.items() if name not in ("event", "step")}
        accelerator.log(values, step=step)
