"""Several processes on gloo train like one; a run that is killed resumes exactly; stages of a run."""

import contextlib
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import flowseg.checkpoint as checkpoint
import flowseg.training.trainer as training
from flowseg import cli
from flowseg.checkpoint import list_checkpoints, read_facts, read_run_config
from flowseg.config import save_config
from flowseg.errors import UserError
from flowseg.segment import Segmenter
from flowseg.training.ema import Ema
from flowseg.training.trainer import train

from .support.processes import forked
from .support.runs import assert_same_weights, checkpoint_names, metrics, steps
from .tiny import TINY_MODEL, folder_section, tiny_config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def logged(run, event, *names):
    """Values by name from each line of one event."""
    return [[line[name] for name in names] for line in metrics(run, event)]


def weights(run):
    return load_file(list_checkpoints(run)[-1] / "ema.safetensors")


def config(batch, **shape):
    # Some pixels are ignored: processes have different numbers of labelled pixels.
    return tiny_config(
        train={"batch_size": batch, "steps": 5, "eval_every": 3, "checkpoint_every": 3, **shape},
        data={"scale_min": 0.5, "flip": True},
        flow={"source": "noise"},
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    run = tmp_path_factory.mktemp("one_process") / "run"
    train(config(8), run)
    return run


def assert_same_run(run, one_process, steps=5):
    """Both runs logged the same losses, gradients and scores, and have the same weights, up to the order of sums."""

    def close(event, names, **tolerance):
        ours, theirs = (torch.tensor(logged(r, event, *names)) for r in (run, one_process))
        torch.testing.assert_close(ours, theirs, **tolerance)
        return len(ours)

    assert close("train", ("loss", "grad_norm"), rtol=1e-4, atol=0) == steps
    close("validation", ("miou", "pixel_accuracy"), rtol=0.02, atol=0.5)
    for name, value in weights(one_process).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_batches_train_as_one(one_process, tmp_path):
    train(config(2, accumulation=4), tmp_path / "run")
    assert_same_run(tmp_path / "run", one_process)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(one_process, tmp_path, strategy):
    shape = {"strategy": strategy, "accumulation": 2}

    def both(rank):
        with (tmp_path / f"said.{rank}").open("w") as said:
            train(config(2, **shape), tmp_path / "run", console=Console(file=said, width=200))

    assert forked(both, world=2) == [0, 0]
    assert_same_run(tmp_path / "run", one_process)
    said = (tmp_path / "said.0").read_text()
    assert said.startswith(f"train: 2 processes ({strategy}) on cpu, float32, 8 examples per step\n"), said
    assert (tmp_path / "said.1").read_text() == ""
    # The result is an ordinary run, which one process can evaluate and resume.
    whole = Segmenter.from_run(tmp_path / "run", config(8))
    assert all(type(p) is torch.nn.Parameter for p in whole.model.parameters())
    shutil.copytree(one_process, tmp_path / "one_process")
    for run in ("run", "one_process"):
        train(config(8, steps=6), tmp_path / run, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "one_process", steps=6)


def test_two_sharded_processes_resume_their_run_exactly(tmp_path):
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


def test_two_processes_evaluate_as_one(one_process, tmp_path, monkeypatch):
    def scores(name):
        monkeypatch.setattr(
            sys, "argv", ["flowseg", "evaluate", "--run", str(one_process), "--json", str(tmp_path / name)]
        )
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
            if rank == 1 and int(arguments[3].draws[0]) >= 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        training.flow_step = step
        result = train(config(2, steps=1000, eval_every=1000), tmp_path / "run")
        assert result.stopped_by == signal.SIGTERM and result.state.step == 4

    assert forked(run, world=2) == [0, 0]
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000004"


class GoodUntil:
    """Pairs that can be read ``count`` times; every later read is an error."""

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
def test_a_bad_file_in_one_of_two_processes_loses_no_step_and_is_reported_once(
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
        sys.stderr = sys.stdout = (tmp_path / f"output{rank}").open("w")
        sys.argv = ["flowseg", "train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
        cli.main()

    assert forked(run, world=2) == [2, 2]
    assert checkpoint_names(tmp_path / "run") == [f"step-{saved:08d}"]
    output = [(tmp_path / f"output{rank}").read_text().replace("\n", " ") for rank in (0, 1)]
    assert "error:" not in output[0] and output[1].count("error:") == 1 and "Traceback" not in "".join(output)
    assert f"a file of the {split} split; step {saved} is saved; continue with: flowseg train" in output[1]
    # A single process continues with the next example, whatever its batch size.
    larger, seen, original = settings.model_copy(deep=True), [], training.flow_step
    larger.train.batch_size = 3
    monkeypatch.setattr(
        training, "flow_step", lambda *given: (seen.extend(given[3].draws.tolist()), original(*given))[1]
    )
    train(larger, tmp_path / "run", resume=True)
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert seen == list(range(2 * saved, 2 * saved + 3 * (6 - saved)))


def kill_in_a_step(step):
    original = Ema.update

    def update(self, model, updates):
        # The parameters are updated, their average is not.
        if updates == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, model, updates)

    Ema.update = update


def kill_in_a_write(step):
    original = checkpoint.save_file

    def save(tensors, path, **options):
        original(tensors, path, **options)
        if f"{step:08d}" in str(path) and path.name.startswith("optimizer"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(KILLED, run)
    return run


KILLED = config(4, checkpoint_every=2, steps=6)


@pytest.mark.parametrize(("kill", "left"), [(kill_in_a_step, 4), (kill_in_a_write, 3)])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, uninterrupted, kill, left):
    def dies(rank):
        kill(4)
        train(KILLED, tmp_path / "run")

    assert forked(dies) == [-signal.SIGKILL]
    assert checkpoint_names(tmp_path / "run")[-1] == f"step-{left:08d}"
    train(KILLED, tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "run", uninterrupted)
    assert logged(tmp_path / "run", "train", "step", "loss") == logged(uninterrupted, "train", "step", "loss")


def test_a_later_stage_changes_the_size_and_resumes_in_it(tmp_path):
    stages = [{"at": 2, "height": 32, "width": 24, "batch_size": 2, "lr": 3e-4}, {"at": 4, "height": 8, "width": 8}]
    seen = []
    original = training.flow_step

    def record(model, codebook, settings, batch, encoder):
        seen.append((tuple(batch.images.shape), batch.draws.tolist()))
        return original(model, codebook, settings, batch, encoder)

    settings = tiny_config(train={"steps": 6, "stages": stages, "checkpoint_every": 3, "eval_every": 2})
    settings.data.scale_max = 2.0
    training.flow_step = record
    try:
        train(settings, tmp_path / "whole")
        assert [shape[2:] for shape, _ in seen] == [(16, 16)] * 2 + [(32, 24)] * 2 + [(8, 8)] * 2
        # Every example is drawn once.
        assert [draw for _, draws in seen for draw in draws] == list(range(4 + 4 + 2 + 2 + 2 + 2))
        shorter = settings.model_copy(deep=True)
        shorter.train.steps, shorter.optim.schedule = 3, "constant"
        settings.optim.schedule = "constant"
        train(shorter, tmp_path / "part")
        # A run that has not reached its last stage is scored at the size of its current stage.
        train(shorter.model_copy(deep=True), tmp_path / "scored")
        save_config(settings, tmp_path / "scored" / "config.yaml")
        heights = {2: 16, 3: 32}
        best = int(read_facts(tmp_path / "scored" / "best.safetensors")["step"])
        first = tmp_path / "scored" / "checkpoints" / "step-00000002"
        paths = {str(first): 16, str(first / "ema.safetensors"): 16}
        for which, height in {"latest": 32, "best": heights[best], "2": 16, **paths}.items():
            assert read_run_config(tmp_path / "scored", checkpoint=which).data.height == height, which
        train(settings, tmp_path / "part", resume=True)
        train(settings, tmp_path / "again")
    finally:
        training.flow_step = original
    assert {lr for (lr,) in logged(tmp_path / "again", "train", "lr")[2:]} == {3e-4}
    for name, value in weights(tmp_path / "again").items():
        assert torch.equal(weights(tmp_path / "part")[name], value), name
    run_config = checkpoint.read_run_config(tmp_path / "again", ["sample.steps=3"])
    assert (run_config.data.height, run_config.data.width, run_config.train.batch_size) == (8, 8, 2)
    with pytest.raises(
        checkpoint.UserError, match=r"train.stages at 2: width must be a multiple of the patch size 8, got 20"
    ):
        bad = tiny_config(train={"stages": [{"at": 2, "height": 16, "width": 20}]}, model=TINY_MODEL)
        train(bad, tmp_path / "bad")
