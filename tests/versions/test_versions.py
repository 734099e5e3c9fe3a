"""The rendered page, reading of results, and resumption of a run. The long run: python -m tests.versions."""

import json

import pytest

from . import __main__ as command
from . import environments, parts
from .environments import Environment


def test_the_page_equals_the_rendered_record():
    assert command.RESULTS.read_text() == command.report(json.loads(command.RECORD.read_text()))


def test_numbers_are_read_from_the_last_line_of_pytest():
    read = parts.counts
    assert read("x\n3 failed, 12 passed, 1 skipped, 2 deselected, 2 errors in 4.1s") == {
        "passed": 12,
        "failed": 5,
        "skipped": 1,
    }
    assert read("1 error in 0.1s")["failed"] == 1 and read("") == {"passed": 0, "failed": 0, "skipped": 0}


def test_a_part_that_dies_without_a_summary_counts_as_failed(monkeypatch, tmp_path):
    environment = Environment("3.11", "2.10.0")
    monkeypatch.setattr(environments, "FOLDER", tmp_path)

    def killed(self, log, *arguments, **variables):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{environment.tree}/a.py died")
        return -11

    monkeypatch.setattr(Environment, "run", killed)
    result = parts.run(parts.PARTS[1], environment)
    assert result["failed"] == 1 and result["last"] == ["a.py died"]
    record = {"3.11 2.10.0": {"parts": {"ops": result | {"commit": "1234567"}}, "date": "2026-01-02"}}
    page = command.report(record)
    assert "| **1 failed** |" in page and "a.py died" in page and page.count("| not run |") >= 1


def test_parts_recorded_at_this_commit_are_not_run_again(monkeypatch, tmp_path):
    environment = Environment("3.11", "2.10.0")
    monkeypatch.setattr(command, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "page.md")
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    every = {part.name for part in parts.PARTS}

    def left(commit="1234567", only=(), again=False):
        return {part.name for part in command.left(environment, commit, only, again)}

    assert left() == every
    command.store(environment.name, {"parts": {"ops": {"passed": 3, "seconds": 1, "commit": "1234567"}}})
    assert left() == every - {"ops"}
    assert left(commit="7654321") == left(again=True) == left(commit="1234567 with uncommitted changes") == every
    assert left(only=["comp", "info"]) == {"compose", "info"}
    path = environments.library("1234567", "cpu", "2.11.0")
    path.parent.mkdir(parents=True)
    path.touch()
    assert left() == every - {"ops"} | {"cpu library of 2.11.0"}


def test_words_that_are_no_versions_are_refused():
    with pytest.raises(SystemExit, match=r"wanted such as 3\.11:2\.10\.0"):
        environments.wanted(["torch"])
    (found,) = environments.wanted([f"{environments.OWN}:2.10.0"])
    assert found == Environment(environments.OWN, "2.10.0")
