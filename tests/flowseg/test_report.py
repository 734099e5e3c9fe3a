"""The report of a run: one file with every part, and figures that show what they are given."""

import io
import warnings

import numpy as np
import pytest
import torch

from flowseg.checkpoint import read_run_config
from flowseg.errors import UserError
from flowseg.report import figures, names
from flowseg.report.run import _class_table, write_report
from flowseg.segment import Segmenter
from flowseg.training.trainer import train

from .support.commands import run
from .tiny import folder_section, tiny_config


def test_report_of_a_run_is_one_file_with_every_part(tmp_path, folder_data, monkeypatch, capsys):
    train(tiny_config(data=folder_section(folder_data), train={"steps": 6}), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tr')
    status, out, err = run(monkeypatch, capsys, "report", tmp_path / "run", "--no-speed")
    assert status == 0 and "report.html" in out, err
    text = (tmp_path / "run" / "report.html").read_text()
    for title in (
        "Convergence",
        "Scores by class",
        "Confusion of classes",
        "Examples",
        "Through code space",
        "Settings",
    ):
        assert f"<h2>{title}" in text
    assert text.count("data:image/png;base64") == 6
    for outside in ("<script", "<link", "src='http", 'src="http'):
        assert outside not in text
    assert "correction_weight: 1.0" in text and "on 2 validation images" in text


def test_report_needs_metrics(tmp_path, folder_data):
    config = tiny_config(data=folder_section(folder_data), train={"steps": 1})
    train(config, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    segmenter = Segmenter.from_run(tmp_path / "run", read_run_config(tmp_path / "run"))
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read"):
        write_report(tmp_path / "run", segmenter, tmp_path / "r.html")


def test_confusion_rows_are_shares_of_the_true_class():
    confusion = np.array([[8, 2, 0, 0], [0, 5, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]])
    figure = figures.confusion_figure(confusion, ("a", "b", "c", "d"))
    shares = figure.axes[0].images[0].get_array()
    # Class c is nowhere; class d is never true but was predicted.
    assert shares.tolist() == [[80, 20, 0], [0, 50, 50], [0, 0, 0]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "d"]


# STIX has the last one, matplotlib's first font does not; no font here has Egyptian hieroglyphs.
ODD_NAMES = ("a$b$c", r"\$", "_hidden", "{0}", "two\nlines", "", "\x1b[31m", "\udcff", "\U00013080", "\u1d8e")
SHOWN = (r"a\$b\$c", r"\\$", " _hidden", "{0}", "two lines", " ", r"\x1b[31m", r"\udcff", "class 8")


@pytest.fixture
def no_other_fonts(monkeypatch):
    """Pictures with matplotlib's own fonts alone; gives a function that adds one."""

    def use(*fonts):
        monkeypatch.setattr(names, "_WIDE_FONTS", fonts)
        names.font_families.cache_clear()
        names._characters.cache_clear()

    use()
    yield use
    monkeypatch.undo()
    names.font_families.cache_clear()
    names._characters.cache_clear()


def draw_names(classes):
    """Texts of the classes in each picture; a warning is an error, and every picture is drawn."""
    count = len(classes)
    palette = [(10 * k, 100, 200) for k in range(count)]
    drawn = (
        figures.iou_figure(classes, [float(count - k) for k in range(count)], palette),
        figures.confusion_figure(np.eye(count), classes),
        figures.legend_figure(classes, palette),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in drawn:
            figure.savefig(io.BytesIO(), format="png", dpi=40)
    ticks = [[label.get_text() for label in figure.axes[0].get_yticklabels()] for figure in drawn[:2]]
    return [*ticks, [text.get_text() for text in drawn[2].legends[0].get_texts()]]


def test_names_of_any_text_are_drawn_as_they_are(no_other_fonts):
    assert draw_names(ODD_NAMES) == [[*SHOWN, "class 9"]] * 3
    assert names.captioned(ODD_NAMES)[-2:] == ["\U00013080 (class 8)", "\u1d8e (class 9)"]
    # A font of this machine that has the character is used.
    no_other_fonts("A font that is not here", "STIXGeneral")
    assert draw_names(ODD_NAMES) == [[*SHOWN, "\u1d8e"]] * 3
    assert names.captioned(ODD_NAMES)[-1] == "\u1d8e"


def test_grid_marks_what_is_wrong():
    truth = np.zeros((4, 4), np.uint8)
    truth[0] = 255
    labels = truth.copy()
    labels[3] = 1
    labels[0] = 1
    row = {"image": np.zeros((4, 4, 3), np.uint8), "truth": truth, "labels": labels, "margin": np.ones((4, 4))}
    figure = figures.grid_figure([row], ((1, 2, 3), (4, 5, 6)))
    wrong = figure.axes[3].images[0].get_array()
    assert (wrong[3] == (200, 30, 30)).all() and not wrong[0].any() and (wrong[1] == 110).all()
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "truth", "prediction"]
    assert "66.7 % right" in [text.get_text() for text in figure.axes[2].texts]


def test_trajectories_end_where_the_pixels_do():
    codes = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0.5, 0], [0, -0.5, 0]])
    truth = np.array([[0, 2], [255, 2]])
    start, end = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    end[:, truth == 0] = torch.tensor([1.0, 0, 0])[:, None]
    figure = figures.trajectory_figure([(0.0, start), (1.0, end)], truth, codes, [(9, 9, 9)] * 4)
    lengths = sorted(np.ptp(line.get_xydata(), 0).max() for line in figure.axes[0].lines if len(line.get_xydata()) == 2)
    # One pixel of class 0 goes all the way; two of class 2 stay; the unlabelled one is not drawn.
    assert lengths == pytest.approx([0, 0, 1])


def test_class_table_by_hand():
    from flowseg.inference.evaluate import scores_from_confusion

    html = _class_table(scores_from_confusion(torch.tensor([[6, 2], [2, 10]])), ("a", "b"))
    cells = [cell.split("<")[0] for cell in html.split("<td class='number'>")[1:]]
    assert cells == ["60.0", "75.0", "75.0", "40.0", "71.4", "83.3", "83.3", "60.0"]
