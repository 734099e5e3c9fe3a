"""The report of a run: one file with all sections, and figures with the right numbers and names."""

import io
import warnings

import numpy as np
import pytest
import torch

from flowseg.checkpoint import read_run_config
from flowseg.data import open_data
from flowseg.errors import UserError
from flowseg.inference.evaluate import evaluate
from flowseg.report import figures, names
from flowseg.report.run import _cards, _class_table, write_report
from flowseg.segment import Segmenter

from .support.commands import run


def test_the_report_of_a_run_is_one_file_with_all_sections(trained_run, monkeypatch, capsys):
    # A killed process may leave half a line.
    with (trained_run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tr')
    status, out, err = run(monkeypatch, capsys, "report", trained_run, "--no-speed")
    assert status == 0 and "report.html" in out, err
    text = (trained_run / "report.html").read_text()
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


def test_cards_show_what_the_metrics_have(trained_run):
    segmenter = Segmenter.from_run(trained_run, read_run_config(trained_run), device="cpu")
    scores = evaluate(segmenter, open_data(segmenter.config.data, ("val",), seed=0).val)
    # Lines of an earlier version, then of this one on a GPU.
    lines = [{"step": step, "images_per_second": 20.0} for step in (1, 2, 3)]
    assert [number for number, _ in _cards(scores, lines)[2:]] == ["3", "20.0"]
    for line, share, peak in zip(lines, (0.5, 0.25, 0.1), (3.0, 19.53, 2.0)):
        line |= {"model_tflops_per_second": 160.6, "data_wait_share": share, "memory_gib": peak}
    assert [number for number, _ in _cards(scores, lines)[3:]] == ["20.0", "161", "25 %", "19.5 GiB"]
    assert _cards(scores, [])[2:] == [("0", "training steps")]


def test_a_report_needs_metrics(trained_run, tmp_path):
    (trained_run / "metrics.jsonl").unlink()
    segmenter = Segmenter.from_run(trained_run, read_run_config(trained_run))
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read"):
        write_report(trained_run, segmenter, tmp_path / "r.html")


def test_rows_of_the_confusion_matrix_are_shares_of_the_true_class():
    confusion = np.array([[8, 2, 0, 0], [0, 5, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]])
    figure = figures.confusion_figure(confusion, ("a", "b", "c", "d"))
    shares = figure.axes[0].images[0].get_array()
    # Class c never occurs. Class d is never true but was predicted.
    assert shares.tolist() == [[80, 20, 0], [0, 50, 50], [0, 0, 0]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "d"]


# The last name is in the font STIX but not in matplotlib's default font. No font here has Egyptian hieroglyphs.
ODD_NAMES = ("a$b$c", r"\$", "_hidden", "{0}", "two\nlines", "", "\x1b[31m", "\udcff", "\U00013080", "\u1d8e")
SHOWN = (r"a\$b\$c", r"\\$", " _hidden", "{0}", "two lines", " ", r"\x1b[31m", r"\udcff", "class 8")


@pytest.fixture
def no_other_fonts(monkeypatch):
    """Draw with matplotlib's own fonts only; the fixture is a function that adds fonts."""

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
    """Draw each figure with warnings as errors; return the texts of the classes in each."""
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


def test_class_names_of_any_text_are_drawn_unchanged(no_other_fonts):
    assert draw_names(ODD_NAMES) == [[*SHOWN, "class 9"]] * 3
    assert names.captioned(ODD_NAMES)[-2:] == ["\U00013080 (class 8)", "\u1d8e (class 9)"]
    # An installed font that has the character is used.
    no_other_fonts("A font that is not here", "STIXGeneral")
    assert draw_names(ODD_NAMES) == [[*SHOWN, "\u1d8e"]] * 3
    assert names.captioned(ODD_NAMES)[-1] == "\u1d8e"


def test_the_grid_marks_wrong_pixels_in_red():
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


def test_trajectories_follow_their_pixels():
    codes = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0.5, 0], [0, -0.5, 0]])
    truth = np.array([[0, 2], [255, 2]])
    start, end = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    end[:, truth == 0] = torch.tensor([1.0, 0, 0])[:, None]
    figure = figures.trajectory_figure([(0.0, start), (1.0, end)], truth, codes, [(9, 9, 9)] * 4)
    lengths = sorted(np.ptp(line.get_xydata(), 0).max() for line in figure.axes[0].lines if len(line.get_xydata()) == 2)
    # The pixel of class 0 moves by 1, the two of class 2 stay, and the unlabelled pixel is not drawn.
    assert lengths == pytest.approx([0, 0, 1])


def test_the_table_of_classes_has_the_numbers_computed_by_hand():
    from flowseg.inference.evaluate import scores_from_confusion

    html = _class_table(scores_from_confusion(torch.tensor([[6, 2], [2, 10]])), ("a", "b"))
    cells = [cell.split("<")[0] for cell in html.split("<td class='number'>")[1:]]
    assert cells == ["60.0", "75.0", "75.0", "40.0", "71.4", "83.3", "83.3", "60.0"]
