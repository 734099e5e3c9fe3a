"""One command as a child process that can be stopped without losing its measurements."""

import contextlib
import functools
import os
import signal
import subprocess

from .results import ROOT


class Interrupted(BaseException):
    """The user or the system asked this run to end; the text is the name of the signal."""


def raise_on_signals():
    """Raise `Interrupted` on Ctrl-C and SIGTERM from now on, so the caller can store its measurements before it exits."""

    def interrupt(number, frame):
        raise Interrupted(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)


def stop(process):
    """Send SIGINT, on which pytest writes its measurements; send SIGKILL if the process has not ended after 6 seconds."""
    for number, patience in ((signal.SIGINT, 6), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def run_to_end(command, seconds, environment, log):
    """Run a command in the repository and write its output to the file `log`; stop it after `seconds`.

    Returns how the command ended ("exit 0", "stopped at its limit of 60 s", "cut") and None, or the `Interrupted` that the caller
    must raise after it has stored the results.
    """
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
            # A shell starts background jobs with SIGINT ignored. The child would inherit that, and `stop` needs SIGINT.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            return f"exit {process.wait(seconds)}", None
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped at its limit of {seconds:.0f} s", None
        except Interrupted as interrupted:
            stop(process)
            return "cut", interrupted
