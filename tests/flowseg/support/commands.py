"""Run the ``flowseg`` command inside a test."""

import sys

import pytest

from flowseg import cli


def run(monkeypatch, capsys, *arguments):
    """Status, standard output and standard error of ``flowseg ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["flowseg", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        cli.main()
        raise SystemExit(0)
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err
