"""Trackers: TensorBoard and Weights & Biases, which receive the settings and every line of the metrics."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowseg.config import Config, shortened
from flowseg.errors import UserError
from flowseg.runs.metrics import log_to_trackers, read_metrics
from flowseg.runs.terminal import printable


def check_trackers(names: list[str], out: Path) -> None:
    """Refuse trackers that cannot work.

    Raises:
        UserError: a tracker is not installed, or TensorBoard cannot write to a folder of this name.
    """
    for name in names:
        if not any(map(importlib.util.find_spec, {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,)))):
            raise UserError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")
    try:
        str(out).encode()
    except UnicodeEncodeError:
        if "tensorboard" in names:
            raise UserError(
                f"train.trackers: tensorboard cannot write to {out}, whose name this locale cannot read; set PYTHONUTF8=1, "
                "or leave it out"
            ) from None


def start_trackers(accelerator: Accelerator, config: Config, step: int) -> None:
    """Start the trackers of a run at ``step`` and give them the settings."""
    # A killed process may have logged steps after its last checkpoint: TensorBoard drops everything from this step on.
    options = {"tensorboard": {"purge_step": step}}
    accelerator.init_trackers(config.train.project, config=_settings(config), init_kwargs=options)


def repeat_step(accelerator: Accelerator, metrics: Path, step: int) -> None:
    """Log the metrics of ``step`` again, which :func:`start_trackers` has made TensorBoard drop."""
    if accelerator.is_main_process and metrics.is_file():
        for line in read_metrics(metrics):
            if line["step"] == step:
                log_to_trackers(accelerator, line)


def _settings(config: Config) -> dict[str, bool | int | float | str]:
    """Settings by dotted name, as the numbers and texts that trackers accept."""
    return {name: _as_tracked(value) for name, value in config.flat().items()}


def _as_tracked(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float):
        return value
    value = shortened(value)
    return printable(value) if isinstance(value, str) else json.dumps(value)
