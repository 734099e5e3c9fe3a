"""The demo in its short form: one self-contained report, numbers beside it, and text that follows the numbers."""

import json
import re
import types

import numpy as np
import pytest
import torch

from flowseg.data.digits import DigitScenes
from flowseg.data.presets import DIGITS
from flowseg.errors import UserError
from flowseg.experiments.demo import run_demo, verdict
from flowseg.report import figures
from flowseg.report.speed import measure_kernels


def test_quick_demo(tmp_path):
    report = run_demo(tmp_path / "demo", quick=True)
    text = report.read_text()
    assert "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text).replace("http-equiv", "")
    assert text.count("data:image/png;base64,") >= 5 and "numbers mean nothing" in text
    assert all((tmp_path / "demo" / name).stat().st_size > 10_000 for name in ("scene.png", "curves.png"))
    numbers = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(numbers["arms"]) == {"vanilla", "FlowSeg"}
    assert f"{numbers['arms']['FlowSeg']['miou']:.1f} %" in text
    # Again into the same folder: earlier runs of the demo are replaced, other things are not touched.
    stranger = tmp_path / "other"
    (stranger / "vanilla").mkdir(parents=True)
    (stranger / "vanilla" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a run of an earlier demo"):
        run_demo(stranger, quick=True)


@pytest.mark.parametrize(
    ("vanilla", "flowseg", "words"), [(10, 20, "FlowSeg is better"), (20, 10, "not better"), (20, 20.5, "no clear")]
)
def test_verdict_follows_the_numbers(vanilla, flowseg, words):
    config = types.SimpleNamespace(train=types.SimpleNamespace(steps=5))
    arms = [
        types.SimpleNamespace(scores=types.SimpleNamespace(miou=value), config=config) for value in (vanilla, flowseg)
    ]
    assert words in verdict(arms) and f"{flowseg:.1f} %" in verdict(arms)


def test_kernels_are_checked_then_timed():
    for row in measure_kernels(size=32, num_classes=20, repeats=1):
        assert row["ours_ms"] > 0 and row["eager_ms"] > 0 and row["max_error"] < 1e-3


def test_figures_draw():
    _, labels = DigitScenes("val", 1, 32, 32)[0]
    truth = np.array(labels)
    path = [(0.0, torch.zeros(3, 32, 32)), (1.0, torch.ones(3, 32, 32))]
    arms = ("vanilla", "FlowSeg")
    made = [
        figures.flow_figure(
            torch.zeros(3, 32, 32), truth, dict.fromkeys(arms, path), dict.fromkeys(arms, truth), DIGITS
        ),
        figures.curve_figure({arm: [(1, 2.0), (2, 3.0)] for arm in arms}, {arm: [(1, 0.5), (2, 0.4)] for arm in arms}),
        figures.speed_figure([{"name": "op", "ours_ms": 1.0, "eager_ms": 9.0}]),
    ]
    assert all(figure.axes for figure in made)
