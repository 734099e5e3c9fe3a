"""Training: it learns, arms see the same examples, a resumed run is exact, signals, files, errors."""

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import flowseg.training.objective as objective
import flowseg.training.trainer as training
from flowseg.build import build
from flowseg.checkpoint import find_weights, list_checkpoints, read_facts, read_run_config
from flowseg.codes import build_codebook
from flowseg.config import save_config
from flowseg.data import open_data
from flowseg.data.loader import example_batches
from flowseg.errors import UserError
from flowseg.inference.evaluate import evaluate
from flowseg.segment import Segmenter
from flowseg.training.ema import Ema
from flowseg.training.run_folder import locked
from flowseg.training.schedule import learning_rate
from flowseg.training.trainer import train
from flowseg_kernels import flow_loss

from .support.processes import start_command, wait_until
from .support.runs import assert_same_weights, checkpoint_names, metrics, steps
from .tiny import TINY_MODEL, folder_section, tiny_config


def test_writes_metrics_config_checkpoints_and_best(tmp_path):
    run = tmp_path / "run"
    result = train(tiny_config(), run)
    assert result.stopped_by == "steps" and result.state.step == 6
    assert steps(run) == [1, 2, 3, 4, 5, 6] and steps(run, "validation") == [3, 6]
    assert {"loss", "squared_error", "grad_norm", "lr", "images_per_second"} <= metrics(run)[0].keys()
    assert (run / "config.yaml").is_file() and (run / "best.safetensors").is_file()
    assert checkpoint_names(run) == ["step-00000006"]
    assert not [*run.rglob(".*")], "a temporary file is left behind"


def test_squared_error_is_the_loss_when_there_is_no_correction(tmp_path):
    train(tiny_config(loss={"correction_weight": 0.0}, train={"steps": 2}), tmp_path / "a")
    for line in metrics(tmp_path / "a", "train"):
        assert line["loss"] == pytest.approx(line["squared_error"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, accumulation, monkeypatch):
    shape = {"accumulation": accumulation, "checkpoint_every": 3}
    augmentation = {"flip": True, "scale_max": 2.0, "color_jitter": 0.2}
    config = tiny_config(train=shape, data=augmentation, flow={"source": "noise"})
    train(config, tmp_path / "whole")

    class Stop(Exception):
        pass

    original, calls = training.flow_step, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 4 * accumulation:
            raise Stop
        return original(*arguments)

    # The run ends in step 5, after the checkpoint of step 3, and saves nothing, like a process that is killed.
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training, "flow_step", stop)
        patch.setattr(training.Trainer, "_save_after_error", lambda self: None)
        train(config, tmp_path / "part")
    assert checkpoint_names(tmp_path / "part")[-1] == "step-00000003"
    torch.rand(5)
    result = train(config, tmp_path / "part", resume=True)
    assert result.state.step == 6
    assert_same_weights(tmp_path / "whole", tmp_path / "part")
    drop = ("images_per_second", "model_tflops_per_second", "data_wait_share", "process_gib", "seconds")
    plain = [
        [{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / name)]
        for name in ("whole", "part")
    ]
    assert plain[0] == plain[1]


def test_both_arms_see_the_same_batches_and_draws(tmp_path, monkeypatch):
    seen = {}
    original = objective.flow_interpolate

    def record(source, labels, t, codebook):
        seen[current].append((source.clone(), labels.clone(), t.clone()))
        return original(source, labels, t, codebook)

    monkeypatch.setattr(objective, "flow_interpolate", record)
    for current, weight in (("vanilla", 0.0), ("flowseg", 1.0)):
        seen[current] = []
        train(tiny_config(loss={"correction_weight": weight}, train={"steps": 3}), tmp_path / current)
    assert len(seen["vanilla"]) == 3
    for first, second in zip(seen["vanilla"], seen["flowseg"]):
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    weights = [load_file(find_weights(tmp_path / name, "latest", "model")) for name in seen]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"correction_weight": 0.0}},
        {"loss": {"correction_weight": 1.0}},
        {"loss": {"correction_weight": 1.0}, "flow": {"predicts": "velocity"}},
        {"codes": {"channels": 8}},
        {"model": {**TINY_MODEL, "condition_on_image": False}},
        {"codes": {"channels": 2}, "flow": {"source": "noise"}},
    ],
)
def test_settings_train_and_the_error_falls(tmp_path, sections):
    config = tiny_config(
        **{"train": {"steps": 40, "eval_every": 100, "batch_size": 8}, "optim": {"lr": 3e-3, "warmup": 5}, **sections}
    )
    result = train(config, tmp_path / "run")
    errors = [line["squared_error"] for line in metrics(tmp_path / "run", "train")]
    assert sum(errors[-8:]) < 0.8 * sum(errors[:8])
    assert result.scores is not None and all(math.isfinite(error) for error in errors)


def test_learns_a_folder_it_can_memorise(tmp_path, folder_data):
    config = tiny_config(
        data=folder_section(folder_data, val_split="train"),
        train={"steps": 120, "eval_every": 1000, "batch_size": 8, "log_every": 20},
        optim={"lr": 5e-3, "warmup": 10},
        sample={"steps": 2},
    )
    config.data.scenes_train = config.data.scenes_val = 1
    result = train(config, tmp_path / "run")
    assert result.scores.miou > 60, result.scores
    segmenter = Segmenter.from_run(tmp_path / "run", config)
    again = evaluate(segmenter, open_data(config.data).val)
    assert torch.equal(again.confusion, result.scores.confusion)


def test_learning_rate_schedule():
    optim = tiny_config(optim={"lr": 1.0, "warmup": 4, "lr_end": 0.1}).optim
    assert learning_rate(optim, 0, 0.0) == 0.25 and learning_rate(optim, 3, 0.0) == 1.0
    assert learning_rate(optim, 10, 0.5) == pytest.approx(0.55) and learning_rate(optim, 10, 1.0) == pytest.approx(0.1)
    optim.schedule = "constant"
    assert learning_rate(optim, 10, 1.0) == 1.0


def test_learning_rate_falls_in_a_straight_line():
    optim = tiny_config(optim={"lr": 1.0, "warmup": 0, "lr_end": 0.1, "schedule": "linear"}).optim
    assert [learning_rate(optim, 10, share) for share in (0, 0.5, 1)] == pytest.approx([1.0, 0.55, 0.1])


def test_averaged_weights_follow_their_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, wanted = Ema(model, 0.5), model.weight.item()
    for updates in range(12):
        with torch.no_grad():
            model.weight.fill_(float(updates))
        decay = min(0.5, (1 + updates) / (10 + updates))
        wanted = decay * wanted + (1 - decay) * updates
        ema.update(model, updates)
        assert ema.tensors["weight"].item() == pytest.approx(wanted, abs=1e-5)


def test_bf16_training_stays_near_float32(tmp_path):
    runs = {}
    for precision in ("no", "bf16"):
        train(tiny_config(train={"mixed_precision": precision, "steps": 4}), tmp_path / precision)
        runs[precision] = [line["loss"] for line in metrics(tmp_path / precision, "train")]
    assert runs["bf16"] == pytest.approx(runs["no"], rel=0.03) and runs["bf16"] != runs["no"]


def test_two_trainers_do_not_share_a_folder(tmp_path):
    run = tmp_path / "run"

    def second(step, _scores):
        with pytest.raises(UserError, match="another process trains there"):
            train(tiny_config(), run)
        seen.append(step)

    seen = []
    train(tiny_config(), run, on_validation=second)
    assert seen == [3, 6]
    assert train(tiny_config(train={"steps": 7}), run, resume=True).state.step == 7


def trainer_that_dies(run, worker_lives):
    with locked(run):
        multiprocessing.get_context("fork").Process(target=worker_lives.wait).start()
        os._exit(9)


def test_a_worker_that_outlives_its_trainer_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    worker_lives = context.Event()
    trainer = context.Process(target=trainer_that_dies, args=(tmp_path / "run", worker_lives))
    trainer.start()
    trainer.join()
    assert trainer.exitcode == 9
    try:
        time.sleep(0.5)
        with locked(tmp_path / "run"):
            pass
    finally:
        worker_lives.set()


def test_a_new_run_in_a_folder_without_checkpoints_replaces_the_files_of_the_old_one(tmp_path):
    run = tmp_path / "run"
    train(tiny_config(), run)
    shutil.rmtree(run / "checkpoints")
    train(tiny_config(train={"steps": 2, "eval_every": 2}), run)
    assert steps(run) == [1, 2]
    assert read_facts(run / "best.safetensors")["step"] == "2"


def test_a_finished_run_resumed_logs_nothing_twice(tmp_path):
    train(tiny_config(), tmp_path / "run")
    before = metrics(tmp_path / "run")
    again = train(tiny_config(), tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == before and again.scores.miou == before[-1]["miou"]


def test_a_signal_interrupts_a_validation_which_the_resumed_run_repeats(tmp_path, monkeypatch):
    config = tiny_config(train={"checkpoint_every": 100})
    train(config, tmp_path / "whole")

    def interrupted(segmenter, pairs, *, on_batch, **others):
        os.kill(os.getpid(), signal.SIGTERM)
        on_batch(1)
        pytest.fail("the validation continued")

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupted)
        result = train(config, tmp_path / "part")
    assert result.stopped_by == signal.SIGTERM and result.state.step == 3
    train(config, tmp_path / "part", resume=True)
    keys = ("event", "step", "loss", "miou")
    whole, part = ([[line.get(k) for k in keys] for line in metrics(tmp_path / name)] for name in ("whole", "part"))
    assert part == whole


def test_settings_that_change_the_meaning_of_the_outputs_are_refused(tmp_path):
    train(tiny_config(), tmp_path / "run")
    with pytest.raises(UserError, match=r"flow.predicts: .*was trained with 'endpoint', got 'velocity'"):
        train(tiny_config(flow={"predicts": "velocity"}), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"codes\.sequence"):
        read_run_config(tmp_path / "run", ["codes.sequence=r_sequence"])


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train(tiny_config(train={"trackers": ["wandb"]}), tmp_path / "run")


def test_a_folder_that_tensorboard_cannot_name_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"tensorboard cannot write to .*set PYTHONUTF8=1"):
        train(tiny_config(train={"trackers": ["tensorboard"]}), tmp_path / "\udce5")


@pytest.mark.parametrize(
    "options",
    [
        {"transform": "inverse"}, {"transform": "neg_sq"}, {"transform": "neg_dist"}, {"max_norm": 0.01}, {"temperature": 3.0},
        {"eps": 0.5}, {"schedule": "annealed"}, {"space": "velocity"}, {"correction_weight": 0.2},
    ],
)  # fmt: skip
def test_every_option_of_the_loss_reaches_the_op(options):
    config = tiny_config(loss=options)
    codebook = build_codebook(config.codes, 11)
    data = open_data(config.data, seed=0)
    batch = next(example_batches(data.train, config, workers=0))
    given = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = objective.flow_step(lambda x, t, image: given, codebook, config, batch)
    names = {"space": "loss_space"}
    named = {names.get(key, key): value for key, value in options.items()}
    args = given, step.source, batch.labels, step.t, codebook
    torch.testing.assert_close(step.flow, flow_loss(*args, predicts="endpoint", reduction="sum", **named))
    assert not torch.isclose(step.flow, flow_loss(*args, predicts="endpoint", reduction="sum"), rtol=1e-4)


def test_gradients_are_clipped_to_the_norm(tmp_path, monkeypatch):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **others):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return original(self, *arguments, **others)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(tiny_config(optim={"grad_clip": 0.01}), tmp_path / "run")
    logged = [line["grad_norm"] for line in metrics(tmp_path / "run", "train")]
    assert norms == pytest.approx([0.01] * 6, rel=1e-3) and min(logged) > 0.1


def test_time_limit_ends_the_run(tmp_path):
    result = train(tiny_config(train={"steps": 100000, "max_minutes": 0.02, "eval_every": 100000}), tmp_path / "run")
    assert result.stopped_by == "time" and 0 < result.state.step < 100000
    assert metrics(tmp_path / "run")[-1]["event"] == "validation"


def test_resuming_drops_a_truncated_line_of_the_metrics(tmp_path):
    run = tmp_path / "run"
    train(tiny_config(), run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    train(tiny_config(train={"steps": 8}), run, resume=True)
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_weights_that_are_nan_are_not_saved(tmp_path, monkeypatch):
    def make_nan(self, parameters, limit):
        for value in list(parameters):
            value.data.fill_(float("nan"))
        return torch.tensor(1.0)

    monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", make_nan)
    config = tiny_config(train={"steps": 2, "log_every": 100, "checkpoint_every": 1})
    with pytest.raises(UserError, match="no longer finite"):
        train(config, tmp_path / "run")
    assert not list_checkpoints(tmp_path / "run")


def test_old_checkpoints_are_deleted(tmp_path):
    train(tiny_config(train={"checkpoint_every": 1, "keep": 2}), tmp_path / "run")
    assert checkpoint_names(tmp_path / "run") == ["step-00000005", "step-00000006"]


def test_errors_at_the_start(tmp_path):
    config = tiny_config(train={"steps": 1})
    with pytest.raises(UserError, match="no checkpoint"):
        train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "run")
    with pytest.raises(UserError, match="already contains a run; add --resume"):
        train(config, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(config, tmp_path / "file")
    with pytest.raises(UserError, match=r"data.width must be a multiple of the patch size 8, got 20; try 16"):
        train(tiny_config(data={"width": 20}), tmp_path / "other")
    wider = tiny_config(model={**TINY_MODEL, "dim": 48}, train={"steps": 2})
    with pytest.raises(UserError, match=r"model.dim: .* was trained with 32, got 48; train another run"):
        train(wider, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"model.size: .* was trained with 'nano', got 'S'; train another run"):
        train(tiny_config(model={"size": "S"}), tmp_path / "run", resume=True)
    # The same network, written in another way.
    train(tiny_config(model={"field_depth": 1}), tmp_path / "run", resume=True)


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_done(tmp_path, resume):
    train(tiny_config(), tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    with pytest.raises(UserError, match=r"^train\.steps is 3, but the run has done 6 steps; give at least 6$"):
        train(tiny_config(train={"steps": 3}), tmp_path / "run", resume=resume)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no longer finite at step"):
        train(tiny_config(optim={"lr": 1e30, "warmup": 0}, train={"steps": 20}), tmp_path / "run")


def test_an_incomplete_checkpoint_is_ignored_and_a_damaged_one_is_an_error(tmp_path):
    run = tmp_path / "run"
    train(tiny_config(train={"steps": 2}), run)
    (run / "checkpoints" / ".step-00000009.123").mkdir()
    (run / "checkpoints" / "step-00000008").mkdir()
    assert checkpoint_names(run) == ["step-00000002"]
    (run / "checkpoints" / "step-00000002" / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged checkpoint"):
        train(tiny_config(), run, resume=True)


def test_auto_resumes_if_there_is_a_checkpoint_and_starts_a_new_run_if_not(tmp_path):
    run = tmp_path / "run"
    first = train(tiny_config(train={"steps": 2}), run, resume="auto")
    again = train(tiny_config(train={"steps": 4}), run, resume="auto")
    assert (first.state.step, again.state.step) == (2, 4)
    assert steps(run) == [1, 2, 3, 4]
    with pytest.raises(UserError, match="resume must be True, False or 'auto', got 'Auto'"):
        train(tiny_config(), run, resume="Auto")


def record_draws(monkeypatch):
    """A list that receives the numbers of the examples of each later batch."""
    original, seen = training.flow_step, []

    def record(*arguments):
        seen.append(arguments[3].draws.tolist())
        return original(*arguments)

    monkeypatch.setattr(training, "flow_step", record)
    return seen


@pytest.mark.parametrize("batch, accumulation", [(2, 1), (7, 1), (1, 3)])
def test_another_batch_size_on_resume_repeats_and_skips_no_example(tmp_path, monkeypatch, batch, accumulation):
    seen = record_draws(monkeypatch)
    train(tiny_config(train={"steps": 3, "batch_size": 4}), tmp_path / "run")
    other = {"steps": 6, "batch_size": batch, "accumulation": accumulation}
    assert train(tiny_config(train=other), tmp_path / "run", resume=True).state.draws == sum(map(len, seen))
    assert [draw for draws in seen for draw in draws] == list(range(12 + 3 * batch * accumulation))


@pytest.mark.parametrize("batch, accumulation, note", [(2, 1, "4 examples per step before, 2 now"), (2, 2, None)])
def test_a_resumed_run_notes_another_number_of_examples_per_step(tmp_path, batch, accumulation, note):
    train(tiny_config(train={"steps": 3, "batch_size": 4}), tmp_path / "run")
    stages = [{"at": 3, "height": 16, "width": 16, "batch_size": 1}]
    for last, expected in ((4, note), (5, None)):
        config = tiny_config(train={"steps": last, "batch_size": batch, "accumulation": accumulation, "stages": stages})
        said = io.StringIO()
        train(config, tmp_path / "run", resume=True, console=Console(file=said, width=200))
        notes = [line for line in said.getvalue().splitlines() if "note:" in line]
        assert notes == ([f"note: {expected}"] if expected else [])
        # The line of the start is about the next step, which a stage may have changed.
        assert f"on cpu, float32, {accumulation} example{'s' * (accumulation > 1)} per step" in said.getvalue()


def test_a_checkpoint_without_a_count_of_examples_counts_with_the_settings_it_was_trained_with(tmp_path, monkeypatch):
    train(tiny_config(train={"steps": 3, "batch_size": 4}), tmp_path / "run")
    state = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    fields = json.loads(state.read_text())
    assert fields.pop("draws") == 12 and fields.pop("sha256")
    state.write_text(json.dumps(fields))
    seen = record_draws(monkeypatch)
    train(tiny_config(train={"steps": 5, "batch_size": 2}), tmp_path / "run", resume=True)
    assert seen == [[12, 13], [14, 15]]


def test_tensorboard_shows_no_step_twice_after_a_run_was_killed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(train={"steps": 6, "checkpoint_every": 2, "eval_every": 4, "trackers": ["tensorboard"]})
    original, left = training.flow_step, []

    def killed(*arguments):
        left.pop()
        if not left:
            raise KeyboardInterrupt
        return original(*arguments)

    # The run is killed in step 2, before the first checkpoint, and in step 4: the tracker has logged steps 1 and 3.
    for calls in (2, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "flow_step", killed)
            left[:] = range(calls)
            train(config, tmp_path / "run", resume="auto")
    assert checkpoint_names(tmp_path / "run")[-1] == "step-00000002"
    train(config, tmp_path / "run", resume=True)
    shown = EventAccumulator(str(tmp_path / "run" / "flowseg")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in shown.Scalars("validation/miou")] == [4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_a_checkpoint(tmp_path, number):
    config = tiny_config(train={"steps": 100000, "eval_every": 100000, "checkpoint_every": 100000})
    save_config(config, tmp_path / "c.yaml")
    run = tmp_path / "run"
    process = start_command(tmp_path / "output", "train", "--config", tmp_path / "c.yaml", "--out", run)
    wait_until(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text(), process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number and "--resume" in (tmp_path / "output").read_text()
    step = int(list_checkpoints(run)[-1].name[-8:])
    assert step >= 1
    result = train(tiny_config(train={"steps": step + 1}), run, resume=True)
    assert result.state.step == step + 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network_to_shard_is_compiled_block_by_block(compiled_graphs, checkpointing):
    config = tiny_config(model={"activation_checkpointing": checkpointing})
    model, eager = (build(config, 5)[0] for _ in range(2))
    calls = []

    @torch._dynamo.disable
    def hook(*_):
        calls.append(1)

    for block in model.blocks:
        # FSDP's hooks are hidden from the compiler in the same way.
        block.register_forward_pre_hook(hook)
    assert training._compiled(model, True) is model and list(model.state_dict()) == list(eager.state_dict())
    inputs = torch.rand(2, 3, 16, 16), torch.rand(2), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for one in (model, eager):
            one.decoder.final_layer.linear.weight.fill_(0.1)
    found, wanted = (one(*inputs) for one in (model, eager))
    torch.testing.assert_close(found, wanted)
    found.square().mean().backward(), wanted.square().mean().backward()
    for one, other in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
    # Both blocks share one graph. Checkpointing runs them again in the backward pass, hooks included.
    assert len(compiled_graphs) == 1 and len(calls) == (4 if checkpointing else 2)
