"""One command as a child process that can be stopped without losing what it has measured."""

import contextlib
import functools
import os
import signal
import subprocess

from .results import ROOT


class Cut(BaseException):
    """The run was told to end."""


def cut_on_signals():
    """From here on a request to end (Ctrl-C, SIGTERM) is a Cut, so that what was measured is stored first."""

    def cut(number, frame):
        raise Cut(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, cut)
    signal.signal(signal.SIGINT, cut)


def stop(process):
    """First as with Ctrl-C, on which pytest writes what it has measured; then for good."""
    for number, patience in ((signal.SIGINT, 6), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def carry_out(command, seconds, environment, log):
    """Runs a command in the repository for at most some seconds, its output in the file `log`; returns how it ended and, if it was
    to be cut, the Cut to raise once everything is written down."""
    path = os.pathsep.join(filter(None, (str(ROOT.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT.parent,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # What a shell script starts with & ignores SIGINT, and so would the child, which is stopped by it.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            return f"exit {process.wait(seconds)}", None
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped at its limit of {seconds:.0f} s", None
        except Cut as cut:
            stop(process)
            return "cut", cut
