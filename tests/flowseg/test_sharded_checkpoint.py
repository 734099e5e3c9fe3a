"""Checkpoints of which each process writes a part: complete or absent, and readable by any number of processes."""

import errno
import importlib
import json
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.distributed as dist

import flowseg.checkpoint as checkpoint
import flowseg.shards as shards
import flowseg.training.run_folder as run_folder
from flowseg.checkpoint import (
    TrainState,
    find_weights,
    list_checkpoints,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    save_sharded_checkpoint,
)
from flowseg.errors import PeerError, UserError
from flowseg.model import build_model
from flowseg.runs.parallel import Ranks, shard
from flowseg.segment import Segmenter
from flowseg.training.ema import Ema
from flowseg.training.trainer import train

from .support.commands import run as run_command
from .support.processes import forked
from .support.runs import checkpoint_names
from .tiny import folder_section, tiny_config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Import once what each forked process would take seconds to import."""
    for name in ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"):
        importlib.import_module(name)


def parts(*, sharded=False, steps=0, **model):
    """A network, its average and its optimiser after some steps with invented gradients."""
    torch.manual_seed(0)
    network = build_model(tiny_config(model=model))
    if sharded:
        shard(network)
    ema = Ema(network, 0.9)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for step in range(steps):
        for parameter in network.parameters():
            parameter.grad = parameter.detach() * 0.1 + step
        optimizer.step()
        ema.update(network, step)
    return network, ema.tensors, optimizer


def saving(run, action, *, sharded=True, before=(5,)):
    """Exit codes of two processes that write checkpoints of the steps ``before`` and then call ``action(ranks, save)``."""

    def work(rank):
        dist.init_process_group("gloo")
        ranks = Ranks(2, rank)
        state = parts(sharded=sharded, steps=2)

        def save(step):
            return save_sharded_checkpoint(run, *state, TrainState(step=step), 2, ranks)

        for step in before:
            save(step)
        action(ranks, save, state)

    return forked(work, world=2)


def refused(ranks, by, words):
    """Expect an error with these words in the process ``by``, and an error without a message of its own in the other."""
    if ranks.rank == by:
        return pytest.raises(UserError, match=words)
    return pytest.raises(PeerError, match=f"process {by} of 2 has failed")


def tensors_of(network, ema, optimizer):
    """All tensors, whole."""
    found = network.state_dict() | {f"ema/{name}": value for name, value in ema.items()}
    return {
        name: checkpoint.whole(value)
        for name, value in {**found, **checkpoint._optimizer_tensors(network, optimizer)}.items()
    }


def assert_equal(first, second):
    first, second = tensors_of(*first), tensors_of(*second)
    assert first.keys() == second.keys() and any(name.startswith("exp_avg/") for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with one sharded checkpoint of two processes with FSDP, at step 5, and one whole checkpoint of the same numbers."""
    run = tmp_path_factory.mktemp("written") / "run"

    def also_whole(ranks, save, state):
        save_checkpoint(run.with_name("whole"), *state, TrainState(step=5), 2, write=ranks.rank == 0)

    assert saving(run, also_whole) == [0, 0]
    return run


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def newest(run):
    return list_checkpoints(run)[-1]


def test_each_process_writes_a_part_and_one_process_reads_the_same_numbers_as_from_one_file(written):
    both, whole = parts(), parts()
    assert load_checkpoint(newest(written), *both).step == 5
    load_checkpoint(newest(written.with_name("whole")), *whole)
    assert_equal(both, whole)
    for name in ("model", "ema", "optimizer"):
        sizes = [file.stat().st_size for file in (newest(written) / name).iterdir()]
        assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes), name
        first = read_tensors(newest(written) / name)
        second = read_tensors(newest(written.with_name("whole")) / f"{name}.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_copies_are_divided_and_any_processes_read_any_checkpoint(written, tmp_path):
    """Copies (DDP) are written once. Two processes, sharded or not, read the checkpoint of the others."""

    def cross(ranks, save, state):
        whole = parts()
        load_checkpoint(newest(written.with_name("whole")), *whole)
        for sharded, source, wanted in (
            (True, tmp_path / "run", state),
            (False, written, whole),
            (True, written, whole),
        ):
            read = parts(sharded=sharded)
            load_checkpoint(newest(source), *read, ranks)
            assert_equal(read, wanted)

    assert saving(tmp_path / "run", cross, sharded=False) == [0, 0]
    sizes = [file.stat().st_size for file in (newest(tmp_path / "run") / "model").iterdir()]
    whole = newest(written.with_name("whole")) / "model.safetensors"
    assert len(sizes) == 2 and sum(sizes) < 1.2 * whole.stat().st_size


def damage_bit(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped bit": damage_bit,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "header": lambda file: os.truncate(file, 9),
    "missing": lambda file: file.unlink(),
    "one too many": lambda file: shutil.copy(file, file.with_name("shard-00003.safetensors")),
    "list": lambda file: damage_bit(file.parent.parent / "shards.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_damage_is_found_and_the_file_named(run, damage, name):
    file = sorted((newest(run) / name).iterdir())[1]
    DAMAGE[damage](file)
    place = {"one too many": "shard-00003", "list": "shards.json"}.get(damage, file.name)
    with pytest.raises(UserError, match=place):
        load_checkpoint(newest(run), *parts())


def test_another_network_is_refused(written):
    with pytest.raises(UserError, match=r"step-00000005.*another model than the settings describe \(blocks"):
        load_checkpoint(newest(written), *parts(depth=3))


def test_only_the_process_that_writes_a_whole_checkpoint_keeps_it_in_memory(tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor) or tensor)
    state = parts(steps=1)
    save_checkpoint(tmp_path, *state, TrainState(), 2, write=False)
    assert not copied
    save_checkpoint(tmp_path, *state, TrainState(), 2)
    assert copied


def test_a_full_disk_of_one_process_fails_in_all_and_leaves_the_earlier_checkpoints(tmp_path):
    def full(ranks, save, state):
        if ranks.rank == 1:
            calls, flush = [], os.fsync

            def fail(handle):
                calls.append(handle)
                if len(calls) == 2:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                flush(handle)

            os.fsync = fail
        with refused(ranks, by=1, words=r"step-00000006: cannot be written \(.*No space left.*step-00000005 is intact"):
            save(6)

    assert saving(tmp_path / "run", full, before=(4, 5)) == [0, 0]
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000005",
    ]
    load_checkpoint(newest(tmp_path / "run"), *parts())


@pytest.mark.parametrize("where", ["shard", "state"])
def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(tmp_path, where):
    """The second process dies when it has written half of a shard, the first one in front of the state."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed(ranks, save, state):
        if where == "shard" and ranks.rank == 1:
            os.fsync = lambda handle: (os.truncate(handle, 1000), die())
        if where == "state" and ranks.rank == 0:
            checkpoint._write_state = die
        save(6)

    codes = saving(tmp_path / "run", killed)
    dead = int(where == "shard")
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] != 0
    assert checkpoint_names(tmp_path / "run") == ["step-00000005"]
    load_checkpoint(newest(tmp_path / "run"), *parts())
    # The first process removes what was written, unless it is the one that died.
    assert bool([*(tmp_path / "run/checkpoints").glob(".step*")]) == (dead == 0)
    save_checkpoint(tmp_path / "run", *parts(steps=1), TrainState(step=7), 2)
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000007",
    ]


def test_a_folder_that_only_one_machine_sees_is_refused(tmp_path, monkeypatch):
    """Each process has its own folder, as on the local disks of two machines."""
    monkeypatch.setattr(shards, "SECONDS_TO_APPEAR", 0.3)

    def apart(ranks, save, state):
        own = tmp_path / f"disk{ranks.rank}"
        own.mkdir()
        with refused(ranks, by=1, words="sees no file that process 0 writes there .*all machines share"):
            run_folder.check_shared(own, ranks)
        with refused(ranks, by=0, words="another process wrote it, but it is not here: "):
            save_sharded_checkpoint(own, *state, TrainState(step=6), 2, ranks)
        if ranks.rank == 0:
            save_checkpoint(own, *parts(), TrainState(step=7), 2)
        with refused(ranks, by=1, words="sees no checkpoint there, process 0 step-00000007; .*all machines share"):
            run_folder.check_same_checkpoints(own, ranks)

    assert saving(tmp_path / "run", apart, sharded=False, before=()) == [0, 0]


def config(data, **shape):
    return tiny_config(
        data=folder_section(data, flip=True),
        train={"batch_size": 2, "steps": 4, "eval_every": 100, "checkpoint_every": 100, **shape},
        optim={"schedule": "constant"},
    )


def test_a_run_changes_between_whole_and_sharded_checkpoints_without_a_difference(
    tmp_path, folder_data, monkeypatch, capsys
):
    def go(rank):
        for name, steps, kind in (
            ("changing", 1, "whole"),
            ("changing", 2, "sharded"),
            ("changing", 4, "whole"),
            ("sharded", 4, "sharded"),
        ):
            settings = config(folder_data, steps=steps, checkpoint=kind, strategy="fsdp")
            train(settings, tmp_path / name, resume="auto")
            assert (newest(tmp_path / name) / "shards.json").is_file() == (kind == "sharded")

    assert forked(go, world=2) == [0, 0]
    first, second = (read_tensors(find_weights(tmp_path / name)) for name in ("changing", "sharded"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    # One process uses the run like any other, and its own checkpoints are whole.
    run = tmp_path / "sharded"
    assert run_command(monkeypatch, capsys, "evaluate", "--run", run, "--checkpoint", "4")[0] == 0
    assert run_command(monkeypatch, capsys, "export", "--run", run, "--out", tmp_path / "shared")[0] == 0
    segmenter = Segmenter.from_run(run, config(folder_data))
    assert all(torch.equal(value, second[name]) for name, value in segmenter.model.state_dict().items())
    train(config(folder_data, steps=5, checkpoint="sharded"), run, resume=True)
    assert checkpoint_names(run) == ["step-00000004", "step-00000005"]
    assert not (newest(run) / "shards.json").exists()
    assert json.loads((newest(run) / "state.json").read_text())["draws"] == 18
