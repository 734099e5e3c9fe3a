"""Several processes on gloo give the losses of one; a process killed outright goes on as if it had not been."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

import flowseg.checkpoint as checkpoint
import flowseg.training.trainer as training
from flowseg import cli
from flowseg.checkpoint import list_checkpoints, read_facts, read_run_config
from flowseg.config import save_config
from flowseg.errors import UserError
from flowseg.segment import Segmenter
from flowseg.training.trainer import train

from .tiny import TINY_MODEL, folder_section, tiny_config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def forked(target, world=1, timeout=120):
    """Exit codes of ``target(rank)`` in ``world`` forked processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        target(rank)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def metrics(run, *names):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines if line["event"] == "train"]


def validations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["miou"], line["pixel_accuracy"]] for line in lines if line["event"] == "validation"]


def weights(run):
    return load_file(list_checkpoints(run)[-1] / "ema.safetensors")


def config(batch, **shape):
    # Some pixels are ignored, so that processes have different numbers of labelled ones.
    return tiny_config(
        train={"batch_size": batch, "steps": 5, "eval_every": 3, "checkpoint_every": 3, **shape},
        data={"scale_min": 0.5, "flip": True},
        flow={"source": "noise"},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(config(8), run)
    return run


def assert_same_run(run, alone, steps=5):
    ours, theirs = (metrics(r, "loss", "grad_norm") for r in (run, alone))
    assert len(ours) == steps
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(validations(run)), torch.tensor(validations(alone)), rtol=0.02, atol=0.5)
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_batches_are_one(alone, tmp_path):
    train(config(2, accumulation=4), tmp_path / "run")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(alone, tmp_path, strategy):
    shape = {"strategy": strategy, "accumulation": 2}
    assert forked(lambda rank: train(config(2, **shape), tmp_path / "run"), world=2) == [0, 0]
    assert_same_run(tmp_path / "run", alone)
    # What they saved is an ordinary run: one process evaluates it and goes on with it.
    whole = Segmenter.from_run(tmp_path / "run", config(8))
    assert all(type(p) is torch.nn.Parameter for p in whole.model.parameters())
    shutil.copytree(alone, tmp_path / "alone")
    for run in ("run", "alone"):
        train(config(8, steps=6), tmp_path / run, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "alone", steps=6)


def test_two_sharded_processes_resume_what_they_saved(tmp_path):
    def run(rank):
        def go(name, steps, **options):
            settings = config(4, steps=steps, strategy="fsdp")
            settings.optim.schedule = "constant"
            train(settings, tmp_path / name, **options)

        go("part", 2)
        go("part", 3, resume=True)
        go("whole", 3)

    assert forked(run, world=2) == [0, 0]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "part")[name], value), name


def test_two_processes_evaluate_as_one(alone, tmp_path, monkeypatch):
    def scores(name):
        monkeypatch.setattr(sys, "argv", ["flowseg", "evaluate", "--run", str(alone), "--json", str(tmp_path / name)])
        cli.main()

    def quietly(rank):
        with contextlib.suppress(SystemExit):
            scores("both.json")

    assert forked(quietly, world=2) == [0, 0]
    with pytest.raises(SystemExit):
        scores("one.json")
    both, one = (json.loads((tmp_path / name).read_text()) for name in ("both.json", "one.json"))
    assert both["images"] == 6 and both == one


def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(tmp_path):
    def run(rank):
        original = training.flow_step

        def step(*arguments):
            if rank == 1 and int(arguments[5][0]) >= 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        training.flow_step = step
        result = train(config(2, steps=1000, eval_every=1000), tmp_path / "run")
        assert result.stopped_by == signal.SIGTERM and result.state.step == 4

    assert forked(run, world=2) == [0, 0]
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000004"


class GoodUntil:
    """Pairs of which one more than ``count`` cannot be read."""

    def __init__(self, pairs, count, name):
        self.pairs, self.left, self.name = pairs, count, name

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise UserError(f"a file of the {self.name} split")
        return self.pairs[index]


@pytest.mark.parametrize(("split", "saved"), [("train", 2), ("val", 3)])
def test_a_bad_file_of_one_of_two_processes_keeps_the_steps_and_is_said_once(
    tmp_path, folder_data, monkeypatch, split, saved
):
    shape = {"steps": 6, "batch_size": 1, "eval_every": 3, "checkpoint_every": 100}
    settings = tiny_config(data=folder_section(folder_data), train=shape)
    save_config(settings, tmp_path / "c.yaml")

    def run(rank):
        opened = training.open_data

        def open_bad(*arguments, **others):
            found = opened(*arguments, **others)
            if rank == 1:
                setattr(found, split, GoodUntil(getattr(found, split), saved if split == "train" else 0, split))
            return found

        training.open_data = open_bad
        sys.stderr = sys.stdout = (tmp_path / f"said{rank}").open("w")
        sys.argv = ["flowseg", "train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
        cli.main()

    assert forked(run, world=2) == [2, 2]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{saved:08d}"]
    said = [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)]
    assert "error:" not in said[0] and said[1].count("error:") == 1 and "Traceback" not in "".join(said)
    assert f"a file of the {split} split; step {saved} is saved; continue with: flowseg train" in said[1].replace(
        "\n", " "
    )
    # One process goes on with the next example, whatever its batch size.
    alone, seen, original = settings.model_copy(deep=True), [], training.flow_step
    alone.train.batch_size = 3
    monkeypatch.setattr(training, "flow_step", lambda *given: (seen.extend(given[5].tolist()), original(*given))[1])
    train(alone, tmp_path / "run", resume=True)
    assert [step for (step,) in metrics(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6]
    assert seen == list(range(2 * saved, 2 * saved + 3 * (6 - saved)))


def kill_in_a_step(step):
    original = training.Ema.update

    def update(self, model, updates):
        # The parameters have moved, their average has not.
        if updates == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, model, updates)

    training.Ema.update = update


def kill_in_a_write(step):
    original = checkpoint.save_file

    def save(tensors, path, **options):
        original(tensors, path, **options)
        if f"{step:08d}" in str(path) and path.name.startswith("optimizer"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save


@pytest.mark.parametrize(("kill", "left"), [(lambda: kill_in_a_step(4), 4), (lambda: kill_in_a_write(4), 3)])
def test_killed_outright_it_goes_on_to_the_same_weights(tmp_path, kill, left):
    settings = config(4, checkpoint_every=2, steps=6)

    def dies(rank):
        kill()
        train(settings, tmp_path / "run")

    assert forked(dies) == [-signal.SIGKILL]
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{left:08d}"
    train(settings, tmp_path / "run", resume=True)
    train(settings, tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "run")[name], value), name
    assert metrics(tmp_path / "run", "step", "loss") == metrics(tmp_path / "whole", "step", "loss")


def test_a_later_stage_changes_the_size_and_resumes_in_it(tmp_path):
    stages = [{"at": 2, "height": 32, "width": 24, "batch_size": 2, "lr": 3e-4}, {"at": 4, "height": 8, "width": 8}]
    seen = []
    original = training.flow_step

    def record(model, codebook, settings, images, labels, draws, encoder):
        seen.append((tuple(images.shape), draws.tolist()))
        return original(model, codebook, settings, images, labels, draws, encoder)

    settings = tiny_config(train={"steps": 6, "stages": stages, "checkpoint_every": 3, "eval_every": 2})
    settings.data.scale_max = 2.0
    training.flow_step = record
    try:
        train(settings, tmp_path / "whole")
        assert [shape[2:] for shape, _ in seen] == [(16, 16)] * 2 + [(32, 24)] * 2 + [(8, 8)] * 2
        # No example is drawn twice or left out.
        assert [draw for _, draws in seen for draw in draws] == list(range(4 + 4 + 2 + 2 + 2 + 2))
        shorter = settings.model_copy(deep=True)
        shorter.train.steps, shorter.optim.schedule = 3, "constant"
        settings.optim.schedule = "constant"
        train(shorter, tmp_path / "part")
        # A run that has not come to its last stage is scored at the size of the stage that it is in.
        train(shorter.model_copy(deep=True), tmp_path / "scored")
        save_config(settings, tmp_path / "scored" / "config.yaml")
        heights = {2: 16, 3: 32}
        best = int(read_facts(tmp_path / "scored" / "best.safetensors")["step"])
        for which, height in {"latest": 32, "best": heights[best], "2": 16}.items():
            assert read_run_config(tmp_path / "scored", checkpoint=which).data.height == height, which
        train(settings, tmp_path / "part", resume=True)
        train(settings, tmp_path / "again")
    finally:
        training.flow_step = original
    assert {lr for (lr,) in metrics(tmp_path / "again", "lr")[2:]} == {3e-4}
    for name, value in weights(tmp_path / "again").items():
        assert torch.equal(weights(tmp_path / "part")[name], value), name
    run_config = checkpoint.read_run_config(tmp_path / "again", ["sample.steps=3"])
    assert (run_config.data.height, run_config.data.width, run_config.train.batch_size) == (8, 8, 2)
    with pytest.raises(
        checkpoint.UserError, match=r"train.stages at 2: width must be a multiple of the patch size 8, got 20"
    ):
        bad = tiny_config(train={"stages": [{"at": 2, "height": 16, "width": 20}]}, model=TINY_MODEL)
        train(bad, tmp_path / "bad")
