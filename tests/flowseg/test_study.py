"""Studies: what is run, what is kept, what is written, and what is refused."""

import json
import subprocess

import pytest
import torch
import yaml
from rich.console import Console

from flowseg.codes import build_codebook
from flowseg.config import load_config, save_config
from flowseg.data import open_data, training_batches
from flowseg.errors import UserError
from flowseg.objective import flow_step
from flowseg.study import Run, load_study, run_study
from flowseg_kernels import nearest_centroid

from .tiny import folder_section, tiny_config

HEAD = ["loss.kind=cross_entropy", "codes.sequence=one_hot", "codes.channels=3", "flow.zero_fraction=1"]
HEAD += ["sample.steps=1", "flow.predicts=endpoint"]
QUIET = Console(quiet=True)


@pytest.fixture
def study_file(tmp_path, folder_data):
    save_config(tiny_config(data=folder_section(folder_data)), tmp_path / "base.yaml")

    def write(**changes):
        tree = {"base": "base.yaml", "steps": 2, "seeds": [0], "sample_steps": [1, 2], "arms": {"FlowSeg": []}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree | changes, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def test_runs_scores_and_keeps_what_is_done_when_a_run_fails(study_file, tmp_path, monkeypatch):
    arms = {"softmax head": HEAD, "too large": ["data.height=999"]}
    study, out = load_study(study_file(arms=arms)), tmp_path / "out"
    with pytest.raises(UserError, match=r"1 of 2 runs failed.*too large, seed 0.*data.height must be a multiple"):
        run_study(study, out, root=None, jobs=1, console=QUIET)
    head = Run(study, "softmax head", 0, out)
    assert list(head.scores()) == [1], "a softmax head is scored at one step"
    table = (out / "table.md").read_text()
    assert f"| softmax head | 1 | {head.scores()[1]['miou']:.1f} |  |" in table and "too large" not in table
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG") and not [*out.glob(".*")]

    # Without the arm that failed nothing is left to run.
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started again"))
    study = load_study(study_file(arms={"softmax head": HEAD}))
    assert run_study(study, out, root=None, jobs=1, console=QUIET).read_text() == table


def test_mean_and_spread_over_seeds(study_file, tmp_path, monkeypatch):
    study = load_study(study_file(seeds=[0, 1, 2]))
    for seed, miou in enumerate((10.0, 20.0, 60.0)):
        run = Run(study, "FlowSeg", seed, tmp_path / "out")
        run.folder.mkdir(parents=True)
        (run.folder / "trained").touch()
        line = {"event": "validation", "step": 2, "miou": miou}
        (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        for steps in study.sample_steps:
            run.score_file(steps).write_text(json.dumps({"miou": miou + steps, "pixel_accuracy": 50.0 + seed}))
    table = run_study(study, tmp_path / "out", root=None, jobs=1, console=QUIET).read_text()
    assert "| FlowSeg | 3 | 31.0 ± 26.5 | 32.0 ± 26.5 | 51.0 ± 1.0 (2) |" in table


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"seed": [0]}, "unknown setting 'seed'; did you mean 'seeds'"),
        ({"seeds": []}, "seeds"),
        ({"arms": {"a": ["loss.correction_wieght=1"]}}, r"arm 'a'.*did you mean 'loss.correction_weight'"),
        ({"base": "none.yaml"}, "none.yaml: cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(study_file, changes, wanted):
    with pytest.raises(UserError, match=wanted):
        load_study(study_file(**changes))


@pytest.mark.parametrize("left_out", [pair for pair in HEAD[1:5] if "channels" not in pair])
def test_a_softmax_head_wants_settings_that_have_no_flow(left_out):
    with pytest.raises(UserError, match=left_out.partition("=")[0]):
        load_config(None, [pair for pair in HEAD if pair != left_out])


def test_softmax_head_is_cross_entropy_and_decodes_to_the_largest_channel(folder_data):
    config = tiny_config(data=folder_section(folder_data))
    for pair in HEAD:
        key, _, value = pair.partition("=")
        section, leaf = key.split(".")
        setattr(getattr(config, section), leaf, yaml.safe_load(value))
    codebook = build_codebook(config.codes, 3)
    data = open_data(config.data, seed=0)
    images, labels, draws = next(training_batches(data.train, config.data, 2, seed=0))
    labels[:, :3] = 255
    logits = torch.randn(2, 3, *labels.shape[1:], requires_grad=True)
    seen = []
    model = lambda x, t, image: (seen.append(t), logits)[1]  # noqa: E731
    value = flow_step(model, codebook, config, images, labels, draws).flow
    kept = labels != 255
    chosen = logits.log_softmax(1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
    torch.testing.assert_close(value, -chosen[kept].sum())
    assert seen[0].eq(0).all()
    assert torch.equal(nearest_centroid(logits.detach(), codebook), logits.argmax(1).to(torch.uint8))
    with pytest.raises(UserError, match=r"codes.channels must be the number of classes, 4"):
        build_codebook(config.codes, 4)
