"""Damaged files, full disks and killed processes: one clear error, no lost step, the last good checkpoint intact."""

import errno
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import flowseg.checkpoint as checkpoint
import flowseg.runs.metrics as metrics
import flowseg.training.trainer as training
from flowseg import cli
from flowseg.checkpoint import TrainState, list_checkpoints, load_checkpoint, read_tensors, save_checkpoint
from flowseg.config import save_config
from flowseg.errors import UserError
from flowseg.hub import save_pretrained
from flowseg.model import build_model
from flowseg.runs.metrics import read_metrics
from flowseg.segment import Segmenter
from flowseg.training.ema import Ema
from flowseg.training.trainer import train

from .support.processes import start_command, wait_until
from .support.runs import TENSOR_FILES, assert_same_weights, checkpoint_names
from .tiny import folder_section, tiny_config

STEPS = {"train": {"steps": 4, "checkpoint_every": 2, "keep": 2}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints at steps 2 and 4."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_config(**STEPS), run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def parts():
    """A new network, average and optimiser, which a checkpoint is loaded into."""
    model = build_model(tiny_config())
    return model, Ema(model, 0.9).tensors, torch.optim.AdamW(model.parameters())


def step_of(path):
    return load_checkpoint(path, *parts()).step


FILES = (*TENSOR_FILES, "state.json")


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_named(run, name):
    newest, before = list_checkpoints(run)[::-1]
    whole = (newest / name).read_bytes()
    for length in (0, 1, 9, len(whole) // 2, len(whole) - 1):
        (newest / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=newest.name):
            step_of(newest)
    assert step_of(before) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_or_changes_nothing(run, name):
    """Bits are flipped in headers and in numbers, where only the checksum can tell."""
    newest = list_checkpoints(run)[-1]
    whole = (newest / name).read_bytes()
    draw = random.Random(0)
    header = int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else len(whole)
    places = [draw.randrange(len(whole)) for _ in range(12)] + [
        draw.randrange(min(header, len(whole))) for _ in range(12)
    ]
    found = 0
    wanted, state = (
        (load_file(newest / name), None) if name != "state.json" else (None, load_checkpoint(newest, *parts()))
    )
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(flipped)
        try:
            if state:
                assert load_checkpoint(newest, *parts()) == state
            else:
                read = read_tensors(newest / name)
                assert read.keys() == wanted.keys() and all(torch.equal(read[k], wanted[k]) for k in wanted)
        except UserError as error:
            assert str(newest) in str(error)
            found += 1
    assert found >= 20


def test_resuming_from_a_damaged_checkpoint_says_what_to_do(run):
    path = list_checkpoints(run)[-1] / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged checkpoint .*optimizer.*delete it to continue from the one before"):
        train(tiny_config(train={"steps": 6}), run, resume=True)
    shutil.rmtree(path.parent)
    assert train(tiny_config(train={"steps": 6}), run, resume=True).state.step == 6


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_every_file_has_the_mode_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        train(tiny_config(train={"steps": 1}), tmp_path / "run")
        save_pretrained(Segmenter.from_run(tmp_path / "run", tiny_config(train={"steps": 1})), tmp_path / "shared")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"best.safetensors", "state.json", *TENSOR_FILES} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}


def test_files_without_a_checksum_are_read(run):
    """Weights of other programs and checkpoints of earlier versions have none."""
    newest = list_checkpoints(run)[-1]
    for name in TENSOR_FILES:
        checkpoint.save_file(load_file(newest / name), newest / name)
    assert step_of(newest) == 4


@pytest.mark.parametrize("place", range(4))
def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_temporary_file(run, monkeypatch, place):
    """The disk is full at the first, second, third or fourth file."""
    calls = itertools.count()
    to_disk = checkpoint._to_disk

    def fail(file):
        if next(calls) == place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        to_disk(file)

    monkeypatch.setattr(checkpoint, "_to_disk", fail)
    model, ema, optimizer = parts()
    with pytest.raises(UserError, match=r"step-00000007: cannot be written \(.*No space left.*step-00000004 is intact"):
        save_checkpoint(run, model, ema, optimizer, TrainState(step=7), keep=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == checkpoint_names(run)
    assert [step_of(path) for path in list_checkpoints(run)] == [2, 4]


def test_a_file_that_may_not_grow_ends_training_and_resuming_is_exact(trained, tmp_path):
    """A limit on file sizes replaces the full disk: the operating system raises the error in the middle of a write."""
    config, run = tiny_config(train={"steps": 4, "checkpoint_every": 2}), tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(list_checkpoints(run)[-1])
    size = (list_checkpoints(run)[-1] / "model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*File too large.*step-00000002 is intact"):
            train(config, run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_names(run) == ["step-00000002"]
    train(config, run, resume=True)
    assert_same_weights(run, trained)


def test_the_command_names_a_full_disk_in_one_line(monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "error: metrics.jsonl: cannot be written (No space left on device)" in capsys.readouterr().err


def in_child(work):
    """Run ``work`` in a forked process and return its exit code, which is negative for a signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", [4, 5], ids=["same_step_again", "new_step"])
def test_a_process_killed_anywhere_in_a_save_leaves_a_complete_checkpoint(run, step):
    """The process is killed at its first, second, ... write, rename or removal; a file that is being written is truncated."""
    model, ema, optimizer = parts()

    def save(die_at):
        calls = itertools.count()

        def deadly(act, written=None):
            def call(*args, **kwargs):
                if next(calls) == die_at:
                    if written:
                        act(*args, **kwargs)
                        os.truncate(written(*args), os.path.getsize(written(*args)) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*args, **kwargs)

            return call

        checkpoint.save_file = deadly(checkpoint.save_file, written=lambda tensors, path: path)
        checkpoint._to_disk = deadly(checkpoint._to_disk)
        checkpoint.shutil.rmtree = deadly(shutil.rmtree)
        checkpoint.Path.rename = deadly(checkpoint.Path.rename)
        save_checkpoint(run, model, ema, optimizer, TrainState(step=step), keep=2)

    for die_at in itertools.count():
        code = in_child(lambda die_at=die_at: save(die_at))
        steps = [step_of(path) for path in list_checkpoints(run)]
        assert steps[-1] in (4, step) and len(steps) >= 2
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert die_at >= 8 and steps[-1] == step
    assert not list((run / "checkpoints").glob(".*")), "the next save did not remove what killed processes left"


def test_a_killed_run_resumes(tmp_path):
    config = tiny_config(train={"steps": 100000, "eval_every": 100000, "checkpoint_every": 1, "keep": 2})
    save_config(config, tmp_path / "c.yaml")
    run = tmp_path / "run"
    process = start_command(tmp_path / "output", "train", "--config", tmp_path / "c.yaml", "--out", run)
    wait_until(lambda: list_checkpoints(run), process)
    time.sleep(random.Random().uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for path in list_checkpoints(run):
        assert f"{step_of(path):08d}" in path.name
    step = step_of(list_checkpoints(run)[-1])
    assert train(tiny_config(train={"steps": step + 2}), run, resume=True).state.step == step + 2


class Fatal:
    """Pairs that call ``fault`` from the example number ``at`` on."""

    def __init__(self, pairs, at, fault):
        self.pairs, self.at, self.fault, self.names = pairs, at, fault, pairs.names
        self.seen = 0

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.seen += 1
        if self.seen > self.at:
            self.fault(self.pairs, index)
        return self.pairs[index]


def kill(pairs, index):
    os.kill(os.getpid(), signal.SIGKILL)


def damage(pairs, index):
    pairs.images[index].write_bytes(b"not a picture")


@pytest.mark.parametrize(
    "workers, fault, words",
    [
        (1, kill, "data.workers: a worker process died .*fewer than 1 workers"),
        (1, damage, r"\.jpg: cannot be read as an image"),
        (0, damage, r"\.jpg: cannot be read as an image"),
    ],
    ids=["killed_worker", "damaged_file_in_worker", "damaged_file"],
)
def test_a_fault_in_the_data_loses_no_step(tmp_path, folder_data, monkeypatch, workers, fault, words):
    data = folder_section(folder_data, workers=workers, flip=True)
    config = tiny_config(data=data, train={"steps": 8, "checkpoint_every": 100, "eval_every": 100, "batch_size": 2})
    train(config, tmp_path / "whole")
    shutil.copytree(folder_data, tmp_path / "copy")
    opened = training.open_data

    def open_fatal(*args, **kwargs):
        found = opened(*args, **kwargs)
        found.train = Fatal(found.train, 9, fault)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(training, "open_data", open_fatal)
        with pytest.raises(UserError, match=words) as error:
            train(config, tmp_path / "part")
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    step = step_of(list_checkpoints(tmp_path / "part")[-1])
    assert 1 <= step <= 4
    shutil.rmtree(folder_data)
    shutil.copytree(tmp_path / "copy", folder_data)
    train(config, tmp_path / "part", resume=True)
    assert_same_weights(tmp_path / "part", tmp_path / "whole")


VALIDATION_FAULTS = {
    "unreadable_file": (UserError("e.jpg: cannot be read"), UserError, "validation: e.jpg: cannot be read"),
    "memory": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        UserError,
        "ran out of memory .*batch_size=1",
    ),
    "bug": (ZeroDivisionError("division by zero"), ZeroDivisionError, "division by zero"),
}


@pytest.mark.parametrize(("fault", "steps"), [*((fault, 3) for fault in VALIDATION_FAULTS), ("unreadable_file", 5)])
def test_a_validation_that_fails_loses_no_step(tmp_path, monkeypatch, fault, steps):
    """It leaves a checkpoint and says how to resume. The resumed run repeats the validation and equals one that never failed."""
    raised, seen, words = VALIDATION_FAULTS[fault]
    config = tiny_config(train={"steps": steps, "eval_every": 3, "checkpoint_every": 100})
    train(config, tmp_path / "whole")

    def fail(*arguments, **others):
        raise raised

    output = io.StringIO()
    with monkeypatch.context() as patch, pytest.raises(seen, match=words) as error:
        patch.setattr(training, "evaluate", fail)
        train(config, tmp_path / "part", console=Console(file=output))
    assert "step 3 is saved; continue with: flowseg train --out" in f"{error.value}{output.getvalue()}"
    assert [step_of(path) for path in list_checkpoints(tmp_path / "part")] == [3]
    train(config, tmp_path / "part", resume=True)
    assert_same_weights(tmp_path / "part", tmp_path / "whole")
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("part", "whole")]
    events = [[(line["event"], line["step"], line.get("miou")) for line in run] for run in lines]
    assert events[0] == events[1] and ("validation", 3) in [event[:2] for event in events[0]]


def test_a_failing_callback_or_a_full_disk_after_a_validation_loses_no_step(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(step, scores):
        raise Stop

    config = tiny_config(train={"steps": 3, "checkpoint_every": 100})
    with pytest.raises(Stop):
        train(config, tmp_path / "run", on_validation=stop)
    assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 3

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"state.json: cannot be written.*intact"):
        patch.setattr(checkpoint.os, "replace", full)
        checkpoint.save_state(tmp_path / "run", TrainState(step=3))
    assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 3
    assert not [*(tmp_path / "run" / "checkpoints").rglob(".*")]
    assert train(config, tmp_path / "run", resume=True).state.validated == 3


def test_a_checkpoint_before_a_validation_does_not_count_among_those_kept(tmp_path):
    config = tiny_config(train={"steps": 11, "checkpoint_every": 4, "eval_every": 5, "keep": 2})
    run, kept = tmp_path / "run", []
    train(config, run, on_validation=lambda *_: kept.append([*map(step_of, list_checkpoints(run))]))
    assert kept == [[4, 5], [4, 8, 10], [8, 11]]


@pytest.mark.parametrize("where", ["metrics", "tracker"])
def test_an_error_while_logging_loses_no_step(tmp_path, monkeypatch, where):
    def full(line):
        if line["step"] >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Json:
        @staticmethod
        def dumps(line):
            full(line)
            return json.dumps(line)

    config = tiny_config(train={"steps": 9, "checkpoint_every": 100, "log_every": 1})
    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(metrics, "json", Json)
        else:
            patch.setattr(metrics, "log_to_trackers", lambda accelerator, line: full(line))
        with pytest.raises((UserError, OSError), match="No space left on device"):
            train(config, tmp_path / "run")
    assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 3
    whole = train(config, tmp_path / "whole").state
    assert train(config, tmp_path / "run", resume=True).state.step == whole.step == 9
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_more_classes_than_the_run_has_codes_for(tmp_path, folder_data):
    """In the label maps, or in the settings of a resumed run: an error counts them, and the run stays as it was."""
    config = tiny_config(data=folder_section(folder_data), train={"steps": 2})
    train(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    classes = [*folder_section(folder_data)["classes"], "new"]
    more = tiny_config(data=folder_section(folder_data, classes=classes), train={"steps": 4})
    with pytest.raises(UserError, match=rf"learnt {len(classes) - 1} classes.*data.classes has {len(classes)}, .*new"):
        train(more, tmp_path / "run", resume=True)
    other = tiny_config(data=folder_section(folder_data), codes={"channels": 4}, train={"steps": 4})
    with pytest.raises(UserError, match=r"codes.channels: .*was trained with 3, got 4"):
        train(other, tmp_path / "run", resume=True)
    label = next((folder_data / "labels" / "train").iterdir())
    values = np.array(Image.open(label))
    values[0, 0] = len(classes) - 1
    Image.fromarray(values).save(label)
    with pytest.raises(UserError, match=rf"{label.name}.*values {len(classes) - 1}"):
        train(config, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
