"""The command line from end to end: train, resume, evaluate, predict, and errors of one line with status 2."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flowseg
from flowseg import cli
from flowseg.config import save_config

from .support.commands import run
from .tiny import folder_section, tiny_config


def test_train_resume_evaluate(trained_run, tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "train", "--out", trained_run, "--resume", "--steps", 5)
    scores = r"mIoU \d+\.\d\d %, pixel accuracy \d+\.\d\d % on 2 images; best mIoU \d+\.\d\d %$"
    assert status == 0 and re.search(r"^step 5 \(ended by steps\): " + scores, err, re.MULTILINE), err
    status, out, _ = run(
        monkeypatch,
        capsys,
        "evaluate",
        "--run",
        trained_run,
        "--json",
        tmp_path / "s.json",
        "--steps",
        3,
        "--method",
        "heun",
    )
    assert status == 0 and "mIoU" in out and "pixel accuracy" in out
    newest = "checkpoints/step-00000005/ema.safetensors"
    assert out.splitlines()[0] == f"{trained_run} on val (2 images), weights {newest}"
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["images"] == 2 and set(scores["iou"]) == {"a", "b", "c"} and scores["sample"]["steps"] == 3
    assert scores["weights"] == newest
    for checkpoint, weights in (
        ("best", r"best.safetensors, step \d"),
        ("5", newest),
        (trained_run / "best.safetensors", r"best.safetensors, step \d"),
        (
            trained_run / "checkpoints" / "step-00000005" / "model.safetensors",
            "checkpoints/step-00000005/model.safetensors",
        ),
        (trained_run / "checkpoints" / "step-00000005", newest),
    ):
        status, out, _ = run(monkeypatch, capsys, "evaluate", "--run", trained_run, "--checkpoint", checkpoint)
        assert status == 0 and re.search(f", weights {weights}$", out.splitlines()[0]), out


def test_predict_writes_masks_overlays_and_margins(trained_run, folder_data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "masks"
    pattern = folder_data / "images" / "train" / "[ab].jpg"
    status, _, _ = run(
        monkeypatch,
        capsys,
        "predict",
        folder_data / "images" / "val",
        pattern,
        "--run",
        trained_run,
        "--out",
        out,
        "--margin",
    )
    assert status == 0
    assert len(list(out.iterdir())) == 4 * 3
    mask = Image.open(out / "e.mask.png")
    assert mask.mode == "P" and mask.size == (40, 24) and np.array(mask).max() < 3
    assert Image.open(out / "e.overlay.png").mode == "RGB" and Image.open(out / "e.margin.png").mode == "L"


def test_a_warning_about_data_is_one_line(trained_run, folder_data, tmp_path, monkeypatch, capsys):
    (folder_data / "images" / "val" / "[b]x.heic").write_bytes(b"x")
    out = tmp_path / "[red]m"
    status, _, err = run(
        monkeypatch, capsys, "predict", folder_data / "images" / "val", "--run", trained_run, "--out", out
    )
    assert status == 0 and "DataWarning" not in err and "2 of 2 images -> " in err and str(out) in err
    (line,) = [line for line in err.splitlines() if "warning:" in line]
    assert "1 .heic (such as [b]x.heic)" in line


def test_predict_continues_after_a_damaged_file(trained_run, folder_data, tmp_path, monkeypatch, capsys):
    inputs = folder_data / "images" / "val"
    (inputs / "bad.png").write_bytes(b"nothing")
    status, _, err = run(monkeypatch, capsys, "predict", inputs, "--run", trained_run, "--out", tmp_path / "m")
    assert status == 1 and "2 of 3 images" in err and "bad.png" in err
    assert (tmp_path / "m" / "f.mask.png").is_file() and not (tmp_path / "m" / "bad.mask.png").exists()


def test_results_of_files_with_equal_stems_get_distinct_names(trained_run, folder_data, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (20, 20)).save(other / "e.png")
    inputs = (folder_data / "images" / "val" / "e.jpg", other)
    assert run(monkeypatch, capsys, "predict", *inputs, "--run", trained_run, "--out", tmp_path / "m")[0] == 0
    assert (tmp_path / "m" / "val_e.mask.png").is_file() and (tmp_path / "m" / "other_e.mask.png").is_file()
    Image.new("RGB", (20, 20)).save(other / "e.jpg")
    assert run(monkeypatch, capsys, "predict", other, "--run", trained_run, "--out", tmp_path / "m")[0] == 0
    assert (tmp_path / "m" / "e.jpg.mask.png").is_file() and (tmp_path / "m" / "e.png.mask.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--out", "x", "--set", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "--out", "x", "--model", "huge"], "model.size must be one of nano"),
        (["train", "--out", "x", "--data", "camvid"], "--root"),
        (["train", "--out", "x", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["evaluate", "--run", "nowhere"], "no config.yaml"),
        (["report", "nowhere"], "run folder nowhere: no config.yaml"),
        (["study", "none.yaml", "--out", "x"], "none.yaml: cannot be read"),
        (["predict", "a.jpg", "--run", "nowhere", "--out", "y"], "no config.yaml"),
    ],
)
def test_errors_of_the_user_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and words in err and len(err.strip().splitlines()) <= 2 and "Traceback" not in err


def test_outputs_that_cannot_be_written_are_errors_before_the_work(
    trained_run, folder_data, tmp_path, monkeypatch, capsys
):
    file, image = tmp_path / "file", folder_data / "images" / "val" / "e.jpg"
    file.write_text("[1]")
    for arguments, words in (
        (["evaluate", "--run", trained_run, "--json", tmp_path], "is a folder; give a file"),
        (["report", trained_run, "--out", file / "r.html"], "its folder cannot be created"),
        (["predict", image, "--run", trained_run, "--out", file], "is a file; give a folder"),
        (["export", "--run", trained_run, "--out", file], "is a file; give a folder"),
        (
            ["export", "--run", trained_run, "--out", tmp_path / "x", "--scores", file],
            "not a file that 'flowseg evaluate --json' writes",
        ),
        (["evaluate", "--run", trained_run, "--set", "data.height=20"], "multiple of the patch size"),
        (["train", "--out", tmp_path / "y", "--set", "model.patch_size=12"], "must be a power of two"),
    ):
        status, _, err = run(monkeypatch, capsys, *arguments)
        assert status == 2 and words in err and "Traceback" not in err, arguments
    assert file.read_text() == "[1]"
    target = tmp_path / "new" / "scores.json"
    assert run(monkeypatch, capsys, "evaluate", "--run", trained_run, "--json", target)[0] == 0 and target.is_file()


def test_a_missing_checkpoint_or_input_is_an_error(trained_run, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "evaluate", "--run", trained_run, "--checkpoint", "99")
    assert status == 2 and "steps kept: 3" in err
    status, _, err = run(monkeypatch, capsys, "predict", "no/such/*.png", "--run", trained_run, "--out", "m")
    assert status == 2 and "no/such" in err


def test_resume_auto_starts_a_run_and_later_continues_it(tmp_path, folder_data, monkeypatch, capsys):
    save_config(tiny_config(data=folder_section(folder_data)), tmp_path / "c.yaml")
    words = ["train", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run"]
    status, _, err = run(monkeypatch, capsys, *words, "--resume", "--steps", 2)
    assert status == 2 and "no checkpoint" in err and "--resume=auto" in err and not (tmp_path / "run").exists()
    for resume, steps in ((["--resume=auto"], 1), (["--resume", "auto"], 2), (["--resume"], 3)):
        status, _, err = run(monkeypatch, capsys, *words, *resume, "--steps", steps)
        assert status == 0 and f"starts at step {steps - 1} of {steps}" in err, err
    # Without --config it uses the settings in --out, even if the run has no checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    status, _, err = run(monkeypatch, capsys, "train", "--out", tmp_path / "run", "--resume=auto", "--steps", 1)
    assert status == 0 and "starts at step 0 of 1" in err and "  folder  " in err, err
    assert run(monkeypatch, capsys, *words, "--resume=automatic")[0] == 2


def test_the_example_of_set_has_an_effect_in_its_command(monkeypatch, capsys):
    sampling = dict.fromkeys(("evaluate", "report", "export", "predict"), "sample.steps=5")
    for command, example in {"train": "optim.lr=3e-4", "flops": "model.size=L", **sampling}.items():
        status, out, _ = run(monkeypatch, capsys, command, "--help")
        assert status == 0 and f"Any setting, such as {example};" in out


NAMES = ["[red]a[/]", "基线 {b}", "$c|<i>_"]


def test_class_names_of_any_text_reach_every_output(tmp_path, folder_data, monkeypatch, capsys):
    config = tiny_config(data=folder_section(folder_data, classes=NAMES), train={"steps": 1})
    save_config(config, tmp_path / "c.yaml")
    place = tmp_path / "run [b]{0}"
    status, _, err = run(monkeypatch, capsys, "train", "--config", tmp_path / "c.yaml", "--out", place)
    assert status == 0 and f"-> {place}" in err
    status, out, _ = run(monkeypatch, capsys, "evaluate", "--run", place, "--json", tmp_path / "s.json")
    assert status == 0 and all(name in out for name in NAMES) and place.name in out
    assert list(json.loads((tmp_path / "s.json").read_text())["iou"]) == NAMES
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*(Glyph|legend|label)")
        status, out, _ = run(monkeypatch, capsys, "report", place, "--no-speed")
        assert status == 0 and re.search(r"\(mIoU \d+\.\d\d % on 2 images\)", out), out
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "[red]a[/]" in page and "基线 {b}" in page and "$c|&lt;i&gt;_" in page and "<i>" not in page
    assert run(monkeypatch, capsys, "export", "--run", place, "--out", tmp_path / "shared")[0] == 0
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    assert card.rstrip().endswith("\\[red\\]a\\[/\\], 基线 \\{b\\}, \\$c\\|\\<i\\>\\_")


def test_scores_are_written_before_anything_is_printed(trained_run, tmp_path, monkeypatch, capsys):
    def broken(**options):
        if not options.get("stderr", True):
            raise OSError("standard output is closed")
        return original(**options)

    original = cli.make_console
    monkeypatch.setattr(cli, "make_console", broken)
    with pytest.raises(OSError, match="standard output is closed"):
        run(monkeypatch, capsys, "evaluate", "--run", trained_run, "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 2


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_commands_work_in_a_locale_without_unicode(tmp_path, folder_data):
    """Three commands in one process, with non-ASCII names in the settings file, on the command line and in a path."""
    config = tiny_config(data=folder_section(folder_data, classes=["x", *NAMES[1:]]), train={"steps": 1})
    save_config(config, tmp_path / "c.yaml")
    readable = (tmp_path / "c.yaml").read_text().replace('"\\u57FA\\u7EBF {b}"', "'基线 {b}'")
    assert "基线" in readable
    (tmp_path / "c.yaml").write_text(readable, encoding="utf-8")
    place = tmp_path / "läuft"
    commands = [
        ["train", "--config", tmp_path / "c.yaml", "--out", place, "--set", "data.classes=[ä, 基线, b]"],
        ["evaluate", "--run", place, "--json", tmp_path / "s.json"],
        ["export", "--run", place, "--out", tmp_path / "shared"],
    ]
    program = """
import sys
from flowseg import cli
words = sys.argv[1:]
while words:
    end = words.index("--end")
    sys.argv, words = ["flowseg", *words[:end]], words[end + 1 :]
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code, left.code
"""
    words = [str(word) for command in commands for word in (*command, "--end")]
    environment = {**os.environ, **ASCII, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert "\\u57fa\\u7ebf" in done.stdout.decode("ascii") and "mIoU" in done.stdout.decode("ascii")
    assert list(json.loads((tmp_path / "s.json").read_text())["iou"]) == ["ä", "基线", "b"]
    assert "ä, 基线, b" in (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")


def test_every_text_file_is_opened_as_utf_8():
    """A file in the encoding of the locale may be unreadable on another machine."""
    modes = re.compile(r"[rwax+]*b[rwax+]*")
    for path in sorted(Path(flowseg.__file__).parent.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            owner = getattr(getattr(call.func, "value", None), "id", "")
            if name not in ("open", "read_text", "write_text") or owner in ("os", "Image"):
                continue
            given = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            binary = name == "open" and any(isinstance(mode, str) and modes.fullmatch(mode) for mode in given)
            named = {keyword.arg for keyword in call.keywords}
            assert binary or "encoding" in named, f"{path}:{call.lineno}: {name} without encoding"


def test_module_entry_prints_the_version():
    result = subprocess.run([sys.executable, "-m", "flowseg", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("flowseg ")


def test_scores_are_shown_even_if_their_file_cannot_be_written(trained_run, tmp_path, monkeypatch, capsys):
    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flowseg.cli.os.replace", full)
        status, out, error = run(patch, capsys, "evaluate", "--run", trained_run, "--json", tmp_path / "s.json")
    assert status == 2 and "mIoU" in out and "the scores are in the table above" in error
    assert not [path for path in tmp_path.iterdir() if "s.json" in path.name]
    status, _, error = run(monkeypatch, capsys, "evaluate", "--run", trained_run, "--json", "/proc/s.json")
    assert status == 2 and "--json /proc/s.json: /proc cannot be written to" in error
