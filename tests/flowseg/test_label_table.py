"""The table of what label maps hold, and the warnings about labels of another convention."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flowseg.config import DataConfig
from flowseg.data import label_table, open_data
from flowseg.data.label_table import count_labels, findings, tell_labels
from flowseg.errors import DataWarning, UserError
from flowseg.training.trainer import train

from .support.benchmarks import CASES
from .tiny import folder_section, tiny_config


def relabel(root, change, splits=("train", "val")):
    for split in splits:
        for path in (root / "labels" / split).glob("*.png"):
            Image.fromarray(change(np.asarray(Image.open(path))).astype(np.uint8)).save(path)


def said(config):
    """The text that is printed, and the warnings that come without a console."""
    data = open_data(config)
    console = Console(file=io.StringIO(), width=120)
    tell_labels(data, config.name, console)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell_labels(data, config.name, None)
    text, messages = console.file.getvalue(), [str(one.message) for one in caught]
    assert all(message in text for message in messages) and text.count("warning: ") == len(messages)
    assert all(one.category is DataWarning for one in caught)
    return text, messages


def test_the_table_holds_the_share_of_each_class_and_of_what_is_ignored(folder_data):
    section = folder_section(folder_data, classes=["[bold]sky[/]", "{x}", "漢字"])
    text, messages = said(DataConfig(**section))
    assert not messages and "train, 4 maps" in text and "val, 2 maps" in text
    labels = np.stack([np.asarray(Image.open(path)) for path in (folder_data / "labels/train").iterdir()])
    for name, value in (("[bold]sky[/]", 0), ("{x}", 1), ("漢字", 2), ("ignored", 255)):
        (row,) = [line for line in text.splitlines() if name in line]
        assert f"{100 * (labels == value).mean():.2f}" in row and f" {value} " in row


def test_masks_of_0_and_255(folder_data):
    relabel(folder_data, lambda values: np.where(values == 0, 0, 255))
    section = folder_section(folder_data, classes=["background", "object"])
    _, messages = said(DataConfig(**section))
    assert len(messages) == 2
    for message, split, fate in zip(messages, ("train", "val"), ("cannot be learnt", "get no score")):
        assert message.startswith(f"{split}: classes without a pixel, which {fate}: object (1 of 2)")
        assert (
            "which is ignored; list it as a class's value with data.values" in message
            and "'data.values=[0, 255]'" in message
        )
    assert said(DataConfig(**section, values=[0, 255]))[1] == []


def test_a_split_without_any_class(folder_data, tmp_path):
    relabel(folder_data, lambda values: values * 0 + 255, ["val"])
    _, messages = said(DataConfig(**folder_section(folder_data)))
    assert len(messages) == 1 and "val: no pixel has a class, every label is ignored (values 255)" in messages[0]
    relabel(folder_data, lambda values: values * 0 + 255)
    with pytest.raises(UserError, match=r"train: no pixel has a class, every label is ignored .*data\.values"):
        train(tiny_config(data=folder_section(folder_data)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("cityscapes", [[0, 7], [18, 255]], r"looks like trainIds .*labelIds.*'data\.values=\[0, 1, .* 18\]'"),
        (
            "ade20k",
            [[0, 149], [7, 255]],
            r"looks like labels that are already reduced \(0\.\.149.*'data\.values=\[0, 1, .* 149\]'",
        ),
        (
            "cocostuff",
            [[0, 11], [170, 255]],
            r"already reduced \(0\.\.170\).*never contain 11; .*'data\.values=\[0, .* 170\]'",
        ),
    ],
)
def test_another_convention_under_the_name_of_a_benchmark(tmp_path, name, values, words):
    CASES[name][0](tmp_path, values)
    with pytest.warns(DataWarning, match=words):
        tell_labels(open_data(DataConfig(name=name, root=tmp_path)), name, None)
    count = {"cityscapes": 19, "ade20k": 150, "cocostuff": 171}[name]
    config = DataConfig(name=name, root=tmp_path, values=list(range(count)))
    assert np.array_equal(open_data(config).train[0][1], values)
    assert not [message for message in said(config)[1] if "looks like" in message]


@pytest.mark.parametrize("name", CASES)
def test_the_labels_that_are_meant_raise_no_suspicion(tmp_path, name):
    make, raw, *_ = CASES[name]
    make(tmp_path, raw if name != "ade20k" else [[0, 1], [150, 2]])
    messages = said(DataConfig(name=name, root=tmp_path))[1]
    assert not [message for message in messages if "looks like" in message]


def test_a_large_set_is_sampled_and_the_table_says_how_much_of_it(folder_data, monkeypatch):
    section = folder_section(folder_data, check="headers")
    relabel(folder_data, lambda values: np.where(values == 2, 1, values))
    text, messages = said(DataConfig(**section))
    assert "train, 4 maps" in text and "which cannot be learnt: c" in messages[0]
    monkeypatch.setattr(label_table, "SAMPLE", 3)
    text, messages = said(DataConfig(**section))
    assert "train, 3 of 4 maps" in text and messages[0].startswith("train (in 3 of 4 label maps): classes without")
    monkeypatch.setattr(label_table, "SECONDS", 0.0)
    assert count_labels(open_data(DataConfig(**section)).train, "train").counted == 1
    relabel(folder_data, lambda values: values * 0 + 7)
    data = open_data(DataConfig(**section))
    counts = count_labels(data.train, "train")
    assert any("values 7 are neither a class nor ignored" in one for one in findings(data.labels, "folder", [counts]))


def test_a_long_list_of_classes_is_cut(folder_data):
    text, messages = said(DataConfig(**folder_section(folder_data, classes=[f"class-{k}" for k in range(100)])))
    assert len([line for line in text.splitlines() if "class-" in line and "warning" not in line]) == 40
    assert all(f"class-{k} " in text for k in range(3)) and "and 89 more (97 of 100)" in messages[0]


def test_training_tells_before_its_first_step(folder_data, tmp_path, monkeypatch):
    relabel(folder_data, lambda values: np.where(values == 0, 0, 255))
    config = tiny_config(data=folder_section(folder_data, classes=["a", "b"]), train={"steps": 1})
    console = Console(file=io.StringIO(), width=120)
    train(config, tmp_path / "run", console=console)
    text = console.file.getvalue()
    assert text.index("share of the labels' pixels") < text.index("'data.values=[0, 255]'") < text.index("step 1 of 1")
    config.data.check = "none"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        train(config, tmp_path / "again")
