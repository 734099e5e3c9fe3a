"""``metrics.jsonl``: one JSON object per line, which a resumed run goes on with."""

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
    """The lines of a metrics file, without one that a killed process left unfinished.

    Raises:
        OSError: the file cannot be read.
    """
    lines = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [fields for fields in lines if fields is not None]


def truncate_metrics(path: Path, *, step: int, validated: int) -> None:
    """Drop what was logged after the checkpoint of ``step``: those steps and validations are done again."""
    if path.is_file():
        until = {"validation": validated}
        kept = [line for line in read_metrics(path) if line["step"] <= until.get(line["event"], step)]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
        return fields if isinstance(fields["event"], str) and math.isfinite(fields["step"]) else None
    except (ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def open_metrics(path: Path, accelerator: Accelerator) -> Iterator[Callable[..., None]]:
    """A function that writes its arguments as one line and to the trackers; only the first process writes.

    Args:
        path: the file; lines are appended.
        accelerator: of the trackers.
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
    """Give a line of the metrics to the trackers, if there are any."""
    if accelerator.trackers:
        event, step = fields["event"], fields["step"]
        values = {f"{event}/{name}": value for name, value in fields.items() if name not in ("event", "step")}
        accelerator.log(values, step=step)
