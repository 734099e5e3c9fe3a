"""The progress bar of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def training_bar(
    console: Console | None, title: str, total: int, step: Callable[[], int]
) -> Iterator[Callable[..., None]]:
    """A function that shows what it is given; it shows nothing without a console.

    Args:
        console: where to draw.
        title: name on the bar.
        total: steps of the run.
        step: steps done so far.
    """
    if console is None:
        yield lambda **_: None
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=step(), facts="")
        facts: dict[str, str] = {}

        def show(
            loss: float | None = None, speed: float | None = None, fraction: float = 0.0, miou: float | None = None
        ) -> None:
            if loss is not None:
                facts["loss"] = f"loss {loss:.4f}"
            if speed is not None:
                facts["speed"] = f"{speed:.1f} img/s"
            if miou is not None:
                facts["miou"] = f"mIoU {miou:.1f}"
            # A time limit may end the run before the steps do; the bar then shows where the steps will have got to.
            likely = round(step() / fraction) if 0 < fraction < 1 else step() if fraction else total
            progress.update(
                task, completed=step(), total=max(step(), min(total, likely)), facts="  ".join(facts.values())
            )

        yield show
