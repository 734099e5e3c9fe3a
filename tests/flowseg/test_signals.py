"""Signals that ask a run to save and stop: which ones, how often, and signals that were ignored from the start."""

import signal

import pytest

import flowseg.training.trainer as training
from flowseg.checkpoint import list_checkpoints
from flowseg.errors import UserError
from flowseg.runs.signals import WARNED, exit_on_signal, stop_on_signal
from flowseg.training.trainer import train

from .support.runs import checkpoint_names
from .tiny import tiny_config


def send(*numbers):
    for number in numbers:
        signal.raise_signal(number)


@pytest.fixture
def handlers():
    """Set the default handlers for the test, whatever handlers this process was started with."""
    numbers = (signal.SIGTERM, signal.SIGINT, *WARNED)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    yield {number: signal.SIG_DFL for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WARNED, ids=lambda number: number.name)
def test_signals_of_schedulers_and_closed_connections_end_the_run_with_a_checkpoint(
    tmp_path, monkeypatch, handlers, number
):
    original = training.flow_step

    def step(*arguments):
        send(number)
        return original(*arguments)

    monkeypatch.setattr(training, "flow_step", step)
    result = train(tiny_config(train={"checkpoint_every": 100}), tmp_path / "run")
    assert result.stopped_by == number and result.state.step == 1
    assert checkpoint_names(tmp_path / "run") == ["step-00000001"]
    assert {known: signal.getsignal(known) for known in handlers} == handlers


def test_a_signal_that_also_kills_the_workers_of_the_loader_is_no_failure(tmp_path, monkeypatch, handlers):
    """Launchers send SIGTERM to a whole group of processes."""
    original, calls = training.StepBatches.next_step, []

    def next_step(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            send(signal.SIGTERM)
            raise UserError("data.workers: a worker process died")
        return original(*arguments)

    monkeypatch.setattr(training.StepBatches, "next_step", next_step)
    result = train(tiny_config(train={"eval_every": 100}), tmp_path / "run")
    assert result.stopped_by == signal.SIGTERM and checkpoint_names(tmp_path / "run") == ["step-00000002"]


def test_a_warning_signal_may_repeat_and_sigterm_may_follow(handlers):
    with stop_on_signal() as received:
        send(signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)
        assert received == [signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM]
        # The next SIGTERM or SIGINT ends the process at once.
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
    assert {known: signal.getsignal(known) for known in handlers} == handlers


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(handlers):
    """``nohup`` starts a process with SIGHUP ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signal() as received, exit_on_signal():
        send(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_programs_own_handler_runs_after_the_save(tmp_path, monkeypatch, handlers):
    seen, original = [], training.flow_step
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append([number, *list_checkpoints(tmp_path / "run")]))

    def step(*arguments):
        send(signal.SIGUSR2)
        assert not seen
        return original(*arguments)

    monkeypatch.setattr(training, "flow_step", step)
    train(tiny_config(), tmp_path / "run")
    assert seen == [[signal.SIGUSR2, tmp_path / "run" / "checkpoints" / "step-00000001"]]


def test_a_command_with_child_processes_exits_on_the_first_signal_and_then_only_on_sigterm(handlers):
    with exit_on_signal():
        with pytest.raises(SystemExit) as left:
            send(signal.SIGHUP)
        assert left.value.code == 128 + signal.SIGHUP
        send(signal.SIGHUP, signal.SIGUSR2)
        with pytest.raises(SystemExit) as left:
            send(signal.SIGTERM)
        assert left.value.code == 128 + signal.SIGTERM
