"""The signals by which schedulers, shells and closed connections ask a run to save and leave."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

ASKED = (signal.SIGTERM, signal.SIGINT)
"""Signals of a person or of a scheduler; a second one ends the process at once."""

WARNED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of a closed connection (SIGHUP) and of SLURM's ``--signal`` and submitit (SIGUSR1, SIGUSR2).

They may come more than once, and SIGTERM may follow them: none of that ends a process that is saving."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that receives the number of each signal that asks to stop; its first entry is the reason to leave.

    A second SIGTERM or SIGINT acts as it did before. SIGHUP, SIGUSR1 and SIGUSR2 stay ignored in a process that was
    started with them ignored, as ``nohup`` does with SIGHUP. A handler that the program had for one of these three, such as
    submitit's, runs when the context has ended and everything is saved.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        if number in ASKED:
            for other in ASKED:
                signal.signal(other, previous[other])

    with _handled(note) as previous:
        yield received
    for number in dict.fromkeys(received):
        if number in WARNED and callable(previous[number]):
            signal.raise_signal(number)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Raise :class:`SystemExit` with status 128 + number on the signals that ask to stop.

    SIGINT is left out: Python raises KeyboardInterrupt on it. After the first one only SIGTERM raises again.
    """
    received: list[int] = []

    def leave(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) == 1 or number in ASKED:
            raise SystemExit(128 + number)

    with _handled(leave, (signal.SIGTERM, *WARNED)):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], numbers: tuple[int, ...] = (*ASKED, *WARNED)) -> Iterator[dict]:
    """Set ``handler`` for ``numbers`` and give the handlers that were there. Only the main thread may do so."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in WARNED:
        if previous.get(number) is signal.SIG_IGN:
            del previous[number]
    for number in previous:
        signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, handler_before in previous.items():
            # None stands for a handler that was not set from Python and that Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler_before is None else handler_before)
