"""Signals by which people, schedulers and closed connections ask a command to save and stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

ASKED = (signal.SIGTERM, signal.SIGINT)
"""Signals from a person or a scheduler. The second one ends the process at once."""

WARNED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of a closed connection (SIGHUP) and of SLURM's ``--signal`` and submitit (SIGUSR1, SIGUSR2).

They may come several times, and SIGTERM may follow them. None of them ends a process that is saving."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Give a list to which the number of each signal is appended; the first entry is the reason to stop.

    A second SIGTERM or SIGINT calls the handler from before the block. SIGHUP, SIGUSR1 and SIGUSR2 stay ignored if the
    process was started with them ignored, as ``nohup`` does with SIGHUP. If the program had a handler for one of these three,
    such as submitit's, it is called after the block, when everything is saved.
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
    """Raise :class:`SystemExit` with status 128 + number when a signal arrives.

    SIGINT is left to Python, which raises KeyboardInterrupt. After the first signal only SIGTERM raises again.
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
    """Set ``handler`` for ``numbers`` and give the previous handlers. Outside the main thread this does nothing."""
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
            # None: a handler that was not set from Python. Python cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler_before is None else handler_before)
