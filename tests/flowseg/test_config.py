"""Settings: order of the sources, checks, and error messages that say what to do."""

import typing
from pathlib import Path

import pytest

from flowseg.config import Config, known_keys, load_config, save_config
from flowseg.errors import UserError
from flowseg.model.sizes import resolve_size


def test_pairs_override_flags_and_flags_override_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 0.1, warmup: 7}\ntrain: {steps: 5}\n")
    config = load_config(file, ["optim.lr=3e-4", "loss.eps=null"], {"train.steps": 9, "train.seed": None})
    assert (config.optim.lr, config.optim.warmup, config.train.steps, config.train.seed) == (3e-4, 7, 9, 0)


def test_defaults_are_the_documented_ones():
    config = Config()
    assert (config.flow.predicts, config.flow.zero_fraction, config.flow.time_sampler) == ("endpoint", 0.5, "uniform")
    assert (config.loss.correction_weight, config.loss.temperature, config.loss.eps) == (1.0, 1.0, None)
    assert (config.codes.channels, config.codes.sequence) == (8, "searched")
    assert (config.optim.grad_clip, config.sample.steps) == (1.0, 1)


def test_saved_settings_read_back(tmp_path):
    config = load_config(None, ["data.name=folder", "data.classes=[a, b]", "data.palette=[[1,2,3],[4,5,6]]"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("optim.learning_rate=1", ["optim.learning_rate", "there are optim.lr, "]),
        ("quux=1", ["there are model, codes"]),
        ("optim.warmpu=1", ["did you mean 'optim.warmup'"]),
        ("train.lr=1", ["did you mean 'optim.lr'"]),
        ("lsos.eps=1", ["did you mean 'loss'"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0", "-1"]),
        ("sample.steps=101", ["sample.steps", "100", "101"]),
        ("sample.method=rk4", ["sample.method", "euler", "rk4"]),
        ("codes.channels=2", ["codes.channels", "flow.source=noise"]),
        ("data.scale_min=3", ["scale_min", "scale_max"]),
        ("data.values=[1..300]", ["data.values", "'1..300'", "ranges such as 1-1203"]),
        ("data.ignore=[9-3]", ["data.ignore", "'9-3'", "ranges such as 1-1203"]),
        ("data.classes=background", ["list of names", "write a list, such as data.classes=[background]", "file"]),
        ("nonsense", ["KEY=VALUE"]),
    ],
)
def test_the_error_about_a_wrong_setting_names_the_key_and_a_remedy(pair, words):
    with pytest.raises(UserError) as error:
        load_config(None, [pair])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("pair", "origin"),
    [
        ("optim.lr=-1", "--set: optim.lr"),
        ("train.stages=[{at: 0, height: 8, width: 8}]", "--set: train.stages.0.at"),
        ("optim=3", "--set: optim"),
        ("lsos.eps=1", "--set: unknown setting 'lsos'"),
        # The conflict is between a value of the file and one of the pair.
        ("data.scale_max=1", "settings: data: scale_min (2) must not exceed"),
        ("sample.steps=3", "settings: sample.steps must be 1"),
        ("data.scale_max=3", "FILE: train.steps"),
        (None, "FILE: train.steps"),
    ],
)
def test_the_error_about_a_wrong_setting_says_where_the_value_comes_from(tmp_path, pair, origin):
    file, text = tmp_path / "c.yaml", "flow: {zero_fraction: 1}\ndata: {scale_min: 2, scale_max: 2}\n"
    file.write_text(text + "train: {steps: 0}\n" * origin.startswith("FILE"))
    with pytest.raises(UserError) as error:
        load_config(file, [pair] if pair else None)
    assert str(error.value).startswith(origin.replace("FILE", str(file)))


def test_unreadable_files_and_repeated_keys_are_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("optim: {lr: 1.0e-3, warmup: 5, lr: 2.0e-3}\n")
    with pytest.raises(UserError, match=r"twice.yaml: .*'lr' is given twice"):
        load_config(tmp_path / "twice.yaml")


def test_a_noise_source_needs_the_image_as_condition():
    with pytest.raises(UserError, match="condition_on_image"):
        load_config(None, ["flow.source=noise", "model.condition_on_image=false"])


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_settings_are_valid_and_build_a_model(file):
    config = load_config(file)
    assert resolve_size(config.model).patch_size and config.data.height % resolve_size(config.model).patch_size == 0


RECIPES = Path(__file__).parents[2] / "configs"


def test_the_recipes_have_the_settings_of_the_paper():
    config = load_config(RECIPES / "ade20k_l16.yaml")
    assert (config.flow.predicts, config.flow.time_sampler, config.loss.schedule) == (
        "velocity",
        "logit_normal",
        "static",
    )
    assert (config.optim.lr, config.optim.weight_decay, config.optim.ema_decay) == (1e-4, 0.0, 0.9999)
    assert (config.sample.method, config.sample.steps, config.repa.weight, config.repa.block) == ("euler", 10, 0.5, 8)
    sizes = [(now.data.height, now.train.batch_size) for now in (config.at_step(0), config.at_step(config.train.steps))]
    assert sizes == [(256, 32), (512, 8)]
    assert resolve_size(load_config(RECIPES / "ade20k_xl16.yaml").model).depth == 26


def test_every_field_can_be_set_from_the_command_line():
    changed = {"bool": lambda v: not v, "int": lambda v: v + 1, "float": lambda v: v * 0.5 or 0.5}
    others = {
        "codes.channels": "12", "data.scale_max": "2.0", "data.classes": "[a, b]", "data.palette": "[[1,2,3],[4,5,6]]",
        "data.ignore": "[7]", "train.trackers": "[tensorboard]", "sample.scales": "[0.5, 1.0]", "train.project": "mine",
        "train.stages": "[{at: 5, height: 32, width: 32}]", "repa.encoder": "folder", "model.pixnerd": "a.ckpt",
        "data.values": "[1, 2]", "model.size": "B", "data.root": "here", "data.train_split": "one", "data.val_split": "two",
    }  # fmt: skip
    config = Config()
    for key in known_keys():
        section, leaf = key.split(".")
        value, field = getattr(getattr(config, section), leaf), type(getattr(config, section)).model_fields[leaf]
        words = [] if key in others else [word for word in _literals(field.annotation) if word != value]
        for text in words or [others.get(key) or str(changed.get(type(value).__name__, lambda _: 16)(value))]:
            with_it = ["codes.channels=11"] if text == "one_hot" else []
            if (key, text) == ("loss.kind", "cross_entropy") or key == "model.head_features":
                with_it = ["loss.kind=cross_entropy"] * (key != "loss.kind") + [
                    "codes.sequence=one_hot",
                    "codes.channels=16",
                    "flow.zero_fraction=1",
                ]
            got = getattr(getattr(load_config(None, [f"{key}={text}", *with_it]), section), leaf)
            assert got != value, key
            if words:
                assert got == text, "an unquoted word must stay a string"


def _literals(annotation):
    """The values of a Literal, also if None is allowed too."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return parts
    return [word for part in parts for word in _literals(part)]


def test_an_empty_section_keeps_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("optim:\ntrain:\n  mixed_precision: no\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.optim == Config().optim and config.train.mixed_precision == "no"


def test_stages_must_come_in_order():
    with pytest.raises(UserError, match="at increasing steps"):
        load_config(None, ["train.stages=[{at: 9, height: 16, width: 16}, {at: 4, height: 16, width: 16}]"])
    with pytest.raises(UserError, match=r"train.stages.0.hieght'; did you mean 'train.stages: height'"):
        load_config(None, ["train.stages=[{at: 9, hieght: 16, width: 16}]"])


@pytest.mark.parametrize("pair", ["sample.steps=2", "sample.method=heun"])
def test_a_network_trained_only_at_t_0_allows_only_one_euler_step(pair):
    assert load_config(None, ["flow.zero_fraction=1"]).sample.steps == 1
    with pytest.raises(UserError, match=r"must be 1 and sample\.method euler when flow\.zero_fraction is 1"):
        load_config(None, ["flow.zero_fraction=1", pair])
