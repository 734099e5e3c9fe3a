"""Studies: which commands run, which results are kept and written, and which study files are refused."""

import io
import json
import re
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from flowseg.checkpoint import list_checkpoints, read_run_config, trained_steps
from flowseg.codes import build_codebook, decode_one_hot
from flowseg.config import load_config, override, save_config
from flowseg.data import open_data
from flowseg.data.loader import example_batches
from flowseg.data.transforms import normalised
from flowseg.errors import UserError
from flowseg.experiments.study import Run, folder_name, folder_names, load_study, run_study
from flowseg.inference.evaluate import evaluate
from flowseg.model import count_flops
from flowseg.segment import Segmenter
from flowseg.training.objective import flow_step
from flowseg.training.trainer import train
from flowseg_kernels import nearest_centroid

from .support.processes import start_command, wait_until
from .tiny import folder_section, tiny_config

HEAD = ["loss.kind=cross_entropy", "codes.sequence=one_hot", "codes.channels=3", "flow.zero_fraction=1"]
HEAD += ["sample.steps=1", "flow.predicts=endpoint"]
QUIET = Console(quiet=True)


def finished(run, miou, accuracy=50.0):
    """Write the files of a run that is trained and scored; ``miou`` is a function of the number of Euler steps."""
    run.folder.mkdir(parents=True)
    (run.folder / "trained").touch()
    line = {"event": "validation", "step": 2, "miou": miou(1)}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for steps in run.sample_steps:
        run.score_file(steps).write_text(json.dumps({"miou": miou(steps), "pixel_accuracy": accuracy}))


@pytest.fixture
def study_file(tmp_path, folder_data):
    save_config(tiny_config(data=folder_section(folder_data)), tmp_path / "base.yaml")

    def write(**changes):
        tree = {"base": "base.yaml", "steps": 2, "seeds": [0], "sample_steps": [1, 2], "arms": {"FlowSeg": []}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree | changes, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def test_a_study_trains_and_scores_its_arms_and_keeps_the_results_when_one_fails(study_file, tmp_path, monkeypatch):
    arms = {"softmax head": HEAD, "too large": ["data.height=999"]}
    study, out = load_study(study_file(arms=arms)), tmp_path / "out"
    with pytest.raises(UserError, match=r"1 of 2 runs failed.*too large, seed 0.*data.height must be a multiple"):
        run_study(study, out, root=None, jobs=1, console=QUIET)
    head = Run(study, "softmax head", 0, out)
    assert list(head.scores()) == [1], "a softmax head is scored with one step only"
    table = (out / "table.md").read_text()
    assert f"| softmax head | 1 | {head.scores()[1]['miou']:.1f} |  |" in table and "too large" not in table
    assert re.search(r"\| [0-9]+ \| 0\.[1-9][0-9] \|$", table, re.M), "training logs its time and memory"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and not [*out.glob(".*")]

    # Nothing is left to run without the arm that failed.
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started again"))
    study = load_study(study_file(arms={"softmax head": HEAD}))
    assert run_study(study, out, root=None, jobs=1, console=QUIET).read_text() == table


def test_the_table_has_mean_and_standard_deviation_over_seeds(study_file, tmp_path, monkeypatch):
    study = load_study(study_file(seeds=[0, 1, 2]))
    for seed, miou in enumerate((10.0, 20.0, 60.0)):
        finished(Run(study, "FlowSeg", seed, tmp_path / "out"), lambda steps, m=miou: m + steps, accuracy=50.0 + seed)
    table = run_study(study, tmp_path / "out", root=None, jobs=1, console=QUIET).read_text()
    assert "| FlowSeg | 3 | 31.0 ± 26.5 | 32.0 ± 26.5 | 51.0 ± 1.0 (2) |" in table


def test_the_table_has_time_per_step_and_memory(study_file, tmp_path):
    study = load_study(study_file(seeds=[0, 1], settings=["train.batch_size=4", "train.accumulation=2"]))
    for seed, (speeds, peaks) in enumerate([((20.0, 40.0, 80.0), (1.0, 3.0, 2.0)), ((50.0,), (3.5,))]):
        run = Run(study, "FlowSeg", seed, tmp_path / "out")
        finished(run, lambda steps: 30.0)
        with (run.folder / "metrics.jsonl").open("a") as file:
            for step, (speed, peak) in enumerate(zip(speeds, peaks), 1):
                line = {"event": "train", "step": step, "images_per_second": speed, "process_gib": peak}
                # On an accelerator the memory of its tensors counts.
                line |= {"memory_gib": 0.5} if seed else {}
                file.write(json.dumps(line) + "\n")
    table = run_study(study, tmp_path / "out", root=None, jobs=1, console=QUIET).read_text().splitlines()
    assert table[0].endswith("| pixel accuracy | ms per training step | peak memory, GiB |")
    # The median of 8 images at 20, 40 and 80 per second is 200 ms; the other seed took 160 ms.
    assert table[2].endswith("| 180 ± 28 | 1.75 ± 1.77 |")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"seed": [0]}, "unknown setting 'seed'; did you mean 'seeds'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 given more than once"),
        ({"arms": {"a": ["train.seed=1"]}}, r"arm 'a': train.seed would give all runs the same seed"),
        ({"seeds": [-1]}, r"seeds.0: .*greater than or equal to 0"),
        ({"arms": {"a": ["loss.correction_wieght=1"]}}, r"arm 'a'.*did you mean 'loss.correction_weight'"),
        ({"base": "none.yaml"}, "none.yaml: cannot be read"),
    ],
)
def test_a_wrong_study_file_is_refused(study_file, changes, wanted):
    with pytest.raises(UserError, match=wanted):
        load_study(study_file(**changes))


@pytest.mark.parametrize(
    "other", ["codes.sequence=kronecker", "flow.zero_fraction=0.5", "flow.predicts=velocity", "sample.steps=2"]
)
def test_a_softmax_head_is_refused_with_settings_of_a_flow(other):
    load_config(None, HEAD)
    with pytest.raises(UserError, match=other.partition("=")[0]):
        load_config(None, [*HEAD, other])


@pytest.mark.parametrize("path", sorted(Path("configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path):
    study = load_study(path)
    assert len(study.seeds) >= 3 and len({folder_name(arm) for arm in study.arms}) == len(study.arms)


def test_a_repeated_arm_is_refused(study_file):
    file = study_file(arms={"a": [], "b": []})
    file.write_text(file.read_text().replace("b: []", "a: [loss.correction_weight=0]"))
    with pytest.raises(UserError, match=r"study.yaml: cannot be read \('a' is given twice"):
        load_study(file)


def test_every_arm_has_its_own_folder_whatever_its_name(study_file, tmp_path):
    arms = [
        "..",
        ".",
        "a/b",
        "a|b [red]",
        "基线",
        "修正",
        "C=3, λ=2",
        "C=3, τ=2",
        "x" * 300,
        "c:\\d",
        "vanilla",
        "r1.5",
    ]
    study = load_study(study_file(arms={arm: [] for arm in arms}))
    folders = folder_names(study.arms)
    assert len({name.lower() for name in folders.values()}) == len(arms)
    assert all(re.fullmatch("[a-z0-9-][a-z0-9.-]{0,119}", name) for name in folders.values())
    for arm in arms:
        assert Run(study, arm, 0, tmp_path / "out").folder.parent.parent == tmp_path / "out"
    # These names have given the same folders since the first version.
    assert (folders["vanilla"], folders["r1.5"], folders["C=3, λ=2"]) == ("vanilla", "r1.5", "c-3-2")
    longer = folder_names([*arms, "C=3, μ=2"])
    assert {arm: longer[arm] for arm in arms} == folders


def test_results_keep_the_names_of_the_arms(study_file, tmp_path):
    arms = ["a|b [red]", "$x_1$", "_hidden", "基线\nzwei", "<i>"]
    study = load_study(study_file(arms={arm: [] for arm in arms}))
    for place, arm in enumerate(arms):
        finished(Run(study, arm, 0, tmp_path / "out"), lambda steps, p=place: 10.0 * p)
    output = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = run_study(study, tmp_path / "out", root=None, jobs=1, console=Console(file=output))
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(arms)
    for row, name in zip(rows, ["a\\|b [red]", "$x_1$", "_hidden", "基线 zwei", "&lt;i>"]):
        assert row.startswith(f"| {name}"), row
    assert "study: 5 of 5" in output.getvalue() and "a|b [red], seed 0" in output.getvalue()


def test_a_folder_trained_with_other_settings_is_refused(study_file, tmp_path):
    study, out = load_study(study_file()), tmp_path / "out"
    run = Run(study, "FlowSeg", 0, out)
    train(load_config(study.base, ["train.steps=2", "train.seed=0"]), run.folder)
    run.check()
    for changes, key in (
        ({"steps": 3}, "train.steps = 2, the study now has 3"),
        ({"arms": {"FlowSeg": ["loss.correction_weight=2"]}}, "loss.correction_weight = 1.0"),
    ):
        with pytest.raises(UserError, match=key):
            run_study(load_study(study_file(**changes)), out, root=None, jobs=1, console=QUIET)


@pytest.mark.filterwarnings("ignore::flowseg.errors.DataWarning")
def test_a_head_may_have_a_linear_layer_after_the_field(folder_data, tmp_path):
    config = tiny_config(data=folder_section(folder_data, classes=[*"abcde"]), train={"steps": 2, "eval_every": 2})
    config = override(config.model_dump(mode="json"), [*HEAD, "codes.channels=5", "model.head_features=4"])
    run = tmp_path / "run"
    train(config, run)
    segmenter = Segmenter.from_run(run, read_run_config(run))
    model = segmenter.model
    assert model.head.weight.shape == (5, 4, 1, 1) and model.decoder.final_layer.linear.out_features == 4
    # The network reads the image and one empty channel, whatever the number of classes is.
    x, t = torch.randn(2, 9, 16, 24), torch.zeros(2)
    with torch.no_grad():
        assert torch.equal(model(x, t, x[:, :3]), model(x[:, :4], t, x[:, :3]))
    assert evaluate(segmenter, open_data(config.data, ("val",)).val).images == 2
    narrow = override(config.model_dump(mode="json"), ["model.head_features=3"])
    assert count_flops(narrow).forward < count_flops(config).forward
    for pair in ("model.head_features=3", "data.num_classes=5"):
        with pytest.raises(UserError, match=rf"{pair.split('=')[0]}: .* was trained with .*; train another run"):
            read_run_config(run, [pair])
    with pytest.raises(UserError, match=r"at least as many classes.*got 6 with cross_entropy and 5"):
        override(config.model_dump(mode="json"), ["model.head_features=6"])
    with pytest.raises(UserError, match=r"model.head_features is for a softmax head"):
        load_config(None, ["model.head_features=8"])


def test_a_run_killed_in_its_first_checkpoint_starts_from_scratch(study_file, tmp_path):
    run = Run(load_study(study_file()), "FlowSeg", 0, tmp_path / "out")
    (run.folder / "checkpoints" / ".step-00000004.999").mkdir(parents=True)
    assert "--resume" not in next(run.commands(None))


def test_sigterm_to_a_study_ends_its_runs_with_a_checkpoint(study_file, tmp_path):
    out = tmp_path / "out"
    study = start_command(tmp_path / "output", "study", study_file(steps=100000), "--out", out)
    metrics = out / "flowseg" / "seed0" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text(), study)
    study.terminate()
    study.join(90)
    assert study.exitcode == 128 + signal.SIGTERM
    assert list_checkpoints(metrics.parent)
    # If the process of the run still lived, the folder would be locked. The signal may come after any number of steps.
    done = trained_steps(metrics.parent)
    train(load_config(metrics.parent / "config.yaml", [f"train.steps={done}"]), metrics.parent, resume=True)


class _Fixed(torch.nn.Module):
    """A network with a given output. It keeps its inputs ``(x, t)`` in ``seen``."""

    def __init__(self, output, seen):
        super().__init__()
        self.output, self.seen = output, seen

    def forward(self, x, t, image):
        self.seen.append((x, t))
        return self.output


def test_one_hot_codes_of_many_classes_decode_to_the_largest_channel_with_the_margin_of_the_codes():
    config = load_config(None, [*HEAD, "codes.channels=20"])
    codebook = build_codebook(config.codes, 20)
    field = 2 * torch.randn(20, 30, 40, generator=torch.Generator().manual_seed(0))
    field[:, 0] = codebook.centroids.T.repeat(1, 2)
    field[5, 2, 4:8] = torch.nan
    labels, margin = nearest_centroid(field[None].double(), codebook, out_dtype=torch.uint8, return_margin=True)
    found = Segmenter(torch.nn.Identity(), codebook, config)._decode(field, with_margin=True)
    assert torch.equal(found[0], labels[0]) and (found[0][2, 4:8] == 255).all()
    # The search adds up the distances of equal channels in different orders. The largest channel has no such rounding.
    field[[3, 7], 1] = 9.0
    assert (decode_one_hot(field)[0][1] == 3).all()
    torch.testing.assert_close(found[1].double(), margin[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_softmax_head_is_cross_entropy_and_decodes_to_the_largest_channel(folder_data):
    config = tiny_config(data=folder_section(folder_data))
    for pair in HEAD:
        key, _, value = pair.partition("=")
        section, leaf = key.split(".")
        setattr(getattr(config, section), leaf, yaml.safe_load(value))
    codebook = build_codebook(config.codes, 3)
    data = open_data(config.data, seed=0)
    config.train.batch_size = 2
    batch = next(example_batches(data.train, config, workers=0))
    labels = batch.labels
    labels[:, :3] = 255
    logits = torch.randn(2, 3, *labels.shape[1:], requires_grad=True)
    seen = []
    model = _Fixed(logits, seen)
    value = flow_step(model, codebook, config, batch).flow
    kept = labels != 255
    chosen = logits.log_softmax(1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
    torch.testing.assert_close(value, -chosen[kept].sum())
    x, t = seen[0]
    assert t.eq(0).all() and torch.equal(x, normalised(batch.images)), "the path starts at the image"
    assert torch.equal(nearest_centroid(logits.detach(), codebook), logits.argmax(1).to(torch.uint8))
    field = logits.detach()[0].clone()
    field[:, 0, 0], field[1, 1, 1], field[:, 2, 2] = 0.5, torch.nan, torch.tensor([-1.0, 2.0, 2.0])
    labels = Segmenter(model, codebook, config)._decode(field, with_margin=False)[0]
    assert torch.equal(labels, decode_one_hot(field)[0].to(torch.uint8))
    assert labels[0, 0] == 0 and labels[1, 1] == 255 and labels[2, 2] == 1
    with pytest.raises(UserError, match=r"codes.channels must be the number of classes, 4"):
        build_codebook(config.codes, 4)
