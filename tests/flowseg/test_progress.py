"""Progress of a command: lines in a log, a bar on a terminal; no name and no closed terminal makes printing fail."""

import errno
import io
import os
import re

import pytest
from rich.console import Console
from rich.table import Table

import flowseg.runs.progress as progress
import flowseg.runs.terminal as terminal
from flowseg.runs.progress import counting_view, has_terminal, setup_line
from flowseg.runs.terminal import SturdyStream, make_console, printable, say
from flowseg.training.trainer import train

from .tiny import tiny_config


class Log(io.StringIO):
    """A log that remembers the text of the last flush."""

    flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


def trained(tmp_path, **shape):
    log = Log()
    train(tiny_config(train=shape), tmp_path / "run", console=Console(file=log, width=40), title="a [red]run[/]")
    assert log.flushed == log.getvalue()
    assert "\r" not in log.flushed and "\x1b" not in log.flushed
    return log.flushed.splitlines()


def test_a_log_has_a_line_for_the_start_each_validation_and_the_end(tmp_path):
    lines = trained(tmp_path, log_every=2)
    assert lines[:2] == [
        "a [red]run[/]: 1 process on cpu, float32, 4 examples per step",
        "a [red]run[/]: starts at step 0 of 6",
    ]
    validations = [line for line in lines if "validation" in line]
    assert [re.search(r"step (\d+) ", line)[1] for line in validations] == ["3", "6"]
    numbers = r": mIoU \d+\.\d\d %, pixel accuracy \d+\.\d\d % on 6 images; best mIoU \d+\.\d\d %$"
    assert all(re.search(numbers, line) for line in validations)
    # The run takes less than LINE_SECONDS: only its first numbers are printed.
    assert [line for line in lines if "loss" in line] == [line for line in lines if "step 2 of 6  loss" in line]
    assert re.fullmatch(r".*: ended at step 6 of 6 by steps after \d+:\d\d:\d\d", lines[-1])


def test_the_line_of_the_start_names_processes_device_precision_and_examples():
    assert setup_line(8, "fsdp", "cuda", "bf16", 256) == "8 processes (fsdp) on cuda, bf16, 256 examples per step"
    assert setup_line(1, "ddp", "cpu", "no", 1) == "1 process on cpu, float32, 1 example per step"


def test_a_log_has_a_progress_line_every_line_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines = trained(tmp_path, log_every=3, steps=5, eval_every=4)
    # Steps between two logged ones are shown too, with the numbers of the last logged step.
    steps = [int(match[1]) for match in (re.search(r"step (\d) of 5  loss", line) for line in lines) if match]
    assert sorted(set(steps)) == [3, 4, 5]
    assert any(re.search(r"step 4  validation 6 of 6 images", line) for line in lines)
    assert any(re.search(r"elapsed 0:\d\d:\d\d  left 0:\d\d:\d\d", line) for line in lines)


def test_counted_work_is_shown_as_lines_in_a_log(monkeypatch):
    log = Log()
    with counting_view(Console(file=log), "evaluate", 30) as advance:
        for _ in range(3):
            advance(10)
    assert log.flushed == "evaluate: 30 of 30\n"
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with counting_view(Console(file=log), "report", None) as advance:
        advance(4)
    assert log.flushed.endswith("report: 4\n")
    with counting_view(None, "nothing", 1) as advance:
        advance(1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_needs_a_terminal_even_if_colours_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert not has_terminal(Console(file=io.StringIO()))
    screen = Terminal()
    console = Console(file=screen)
    assert has_terminal(console)
    with counting_view(console, "[b]{name}[/b]", 2) as advance:
        advance(2)
    assert "[b]{name}[/b]" in screen.getvalue() and "2/2" in screen.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    assert not has_terminal(Console(file=Terminal()))


NAMES = ["[red]a[/]", "[/]", "{0}", "a/b", "基线", ":smile:", "a\\[b]", "\x1b[31m", "\udcff"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_name_is_printed_in_any_encoding(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(terminal.sys, "stderr", io.TextIOWrapper(raw, encoding=encoding))
    console = make_console()
    table = Table("name", title=printable(NAMES[1]))
    for name in NAMES:
        say(console, f"<{name}>")
        table.add_row(printable(name))
    console.print(table)
    text = raw.getvalue().decode(encoding)
    shown = [printable(name).encode(encoding, "backslashreplace").decode(encoding) for name in NAMES]
    assert text.splitlines()[: len(NAMES)] == [f"<{name}>" for name in shown]
    assert printable("\udce5\udcb0\udcbe") == "尾", "UTF-8 bytes that Python has read as ASCII are decoded"
    assert shown[:4] == NAMES[:4] and shown[-2:] == ["\\x1b[31m", "\\udcff"]
    assert all(name in text.split(f"<{shown[-1]}>")[1] for name in shown)


def test_training_continues_when_its_terminal_is_closed(tmp_path):
    class Closed(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def flush(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def isatty(self):
            return True

    closed = Closed()
    console = Console(file=SturdyStream(closed), force_terminal=True)
    assert train(tiny_config(train={"steps": 3}), tmp_path / "run", console=console).state.step == 3
    assert closed.writes == 1
