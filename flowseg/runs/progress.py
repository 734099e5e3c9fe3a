"""Progress of a command: a bar on a terminal, occasional plain lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowseg.runs.terminal import printable, say

LINE_SECONDS = 30.0
"""Shortest time between two log lines that only report progress."""


def has_terminal(console: Console) -> bool:
    """Whether a bar can move on this console. A file is no terminal, even if the environment forces colours."""
    return console.is_jupyter or (console.is_interactive and console.file.isatty())


def setup_line(world: int, strategy: str, device: str, precision: str, examples: int) -> str:
    """What trains, such as ``2 processes (ddp) on cuda, bf16, 4 examples per step``.

    Args:
        world: number of processes.
        strategy: how they share the training: ``train.strategy``.
        device: type of their devices.
        precision: ``"bf16"`` or ``"no"``.
        examples: number of examples that all processes together draw for a step.
    """
    processes = f"{world} processes ({strategy})" if world > 1 else "1 process"
    per_step = f"{examples} example{'s' * (examples > 1)} per step"
    return f"{processes} on {device}, {'float32' if precision == 'no' else precision}, {per_step}"


class TrainingView:
    """Progress of a training run. This base class shows nothing."""

    def tick(self) -> None:
        """A step is done."""

    def show(self, fraction: float = 0.0, **numbers: float | None) -> None:
        """Show the share of the run that is done and the newest ``numbers``.

        Their names are ``loss``, ``speed`` (images per second), ``wait`` (share of the time in which the training waited for
        data, shown from 10 % on), ``workers`` (processes that load the data; without them the training does so itself),
        ``memory`` (GiB) and ``miou`` (of the last validation, in percent).
        """

    def validating(self, done: int, total: int) -> None:
        """A validation has seen ``done`` of ``total`` images."""

    def validated(self, miou: float, pixel_accuracy: float, images: int, best: float) -> None:
        """A validation is done; ``best`` is the highest mIoU so far. Scores are in percent."""

    def saved(self) -> None:
        """A checkpoint is written."""

    def ended(self, reason: str) -> None:
        """The training loop has ended."""


class _Bar(TrainingView):
    def __init__(self, progress: Progress, title: str, total: int, step: Callable[[], int]):
        self.progress, self.total, self.step = progress, total, step
        self.task = progress.add_task(escape(printable(title)), total=total, completed=step(), facts="")
        self.facts: dict[str, str] = {}

    def show(self, fraction: float = 0.0, **numbers: float | None) -> None:
        self.facts |= _facts(numbers)
        # A time limit may end the run early; the bar then shows the step that the run will probably reach.
        likely = round(self.step() / fraction) if 0 < fraction < 1 else self.step() if fraction else self.total
        total = max(self.step(), min(self.total, likely))
        self.progress.update(self.task, completed=self.step(), total=total, facts=_joined(self.facts))


class _Lines(TrainingView):
    def __init__(self, console: Console, title: str, total: int, step: Callable[[], int]):
        self.console, self.title, self.total, self.step = console, title.strip(), total, step
        self.facts: dict[str, str] = {}
        self.start: tuple[float, float] | None = None
        self.left = ""
        self.begin, self.last = time.monotonic(), float("-inf")
        self._say(f"starts at step {step()} of {total}")

    def tick(self) -> None:
        # The next logged step may be many slow steps away.
        if self.facts:
            self._say_rarely()

    def show(self, fraction: float = 0.0, **numbers: float | None) -> None:
        self.facts |= _facts(numbers)
        now = time.monotonic()
        self.start = self.start or (now, fraction)
        done = fraction - self.start[1]
        if done > 0:
            self.left = f"  left {_clock((now - self.start[0]) * (1 - min(fraction, 1.0)) / done)}"
        self._say_rarely()

    def validating(self, done: int, total: int) -> None:
        self._say_rarely(f"step {self.step()}  validation {min(done, total)} of {total} images")

    def validated(self, miou: float, pixel_accuracy: float, images: int, best: float) -> None:
        self._say(
            f"step {self.step()}  validation: mIoU {miou:.2f} %, pixel accuracy {pixel_accuracy:.2f} % on "
            f"{images} images; best mIoU {best:.2f} %"
        )

    def saved(self) -> None:
        self._say(f"step {self.step()}  checkpoint saved")

    def ended(self, reason: str) -> None:
        self._say(
            f"ended at step {self.step()} of {self.total} by {reason} after {_clock(time.monotonic() - self.begin)}"
        )

    def _say_rarely(self, text: str | None = None) -> None:
        if time.monotonic() - self.last >= LINE_SECONDS:
            self.last = time.monotonic()
            facts = _joined(self.facts)
            elapsed = _clock(self.last - self.begin)
            self._say(text or f"step {self.step()} of {self.total}  {facts}  elapsed {elapsed}{self.left}")

    def _say(self, text: str) -> None:
        say(self.console, f"{self.title}: {text}")


@contextlib.contextmanager
def training_view(console: Console | None, title: str, total: int, step: Callable[[], int]) -> Iterator[TrainingView]:
    """Give a view of a training run: a bar on a terminal, lines elsewhere, nothing without a console.

    Args:
        console: where to print.
        title: name of the run.
        total: steps of the run.
        step: returns the number of steps done so far.
    """
    if console is None:
        yield TrainingView()
    elif has_terminal(console):
        columns = (*_columns(), TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            yield _Bar(progress, title, total, step)
    else:
        yield _Lines(console, title, total, step)


@contextlib.contextmanager
def counting_view(
    console: Console | None, title: str, total: int | None, *, every: bool = False
) -> Iterator[Callable[..., None]]:
    """Give a function ``advance(count, name)`` that counts finished work: a bar on a terminal, lines elsewhere.

    Args:
        console: where to print; ``None`` prints nothing.
        title: name of the work.
        total: amount of work, if known.
        every: print a line for each call instead of one every ``LINE_SECONDS``.
    """
    if console is None:
        yield lambda count=1, name="": None
    elif has_terminal(console):
        with Progress(*_columns(), TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task(escape(printable(title)), total=total)
            yield lambda count=1, name="": progress.advance(task, count)
    else:
        yield _counter(console, title.strip(), total, every)


def _counter(console: Console, title: str, total: int | None, every: bool) -> Callable[..., None]:
    done, last = 0, time.monotonic()

    def advance(count: int = 1, name: str = "") -> None:
        nonlocal done, last
        done += count
        if every or time.monotonic() - last >= LINE_SECONDS or done == total:
            last = time.monotonic()
            say(console, f"{title}: {done}" + (f" of {total}" if total else "") + (f"  {name}" if name else ""))

    return advance


def _columns() -> tuple[TextColumn, BarColumn, MofNCompleteColumn]:
    return TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn()


_TEXTS = {"loss": "loss {:.4f}", "speed": "{:.1f} img/s", "memory": "{:.1f} GiB", "miou": "mIoU {:.1f} %"}


def _facts(numbers: dict[str, float | None]) -> dict[str, str]:
    facts = {name: text.format(numbers[name]) for name, text in _TEXTS.items() if numbers.get(name) is not None}
    wait = numbers.get("wait")
    if wait is not None:
        share = f"{100 * wait:.0f} %"
        # Without workers the step itself reads its examples, which is no sign of a fault.
        text = f"reads data {share} of the time" if numbers.get("workers") == 0 else f"waits for data {share}"
        facts["wait"] = text if wait >= 0.1 else ""
    return facts


def _joined(facts: dict[str, str]) -> str:
    return "  ".join(filter(None, facts.values()))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
