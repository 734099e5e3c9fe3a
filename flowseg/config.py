"""The validated settings of a run: one tree of small sections, read from YAML, flags and ``key=value`` pairs."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flowseg.errors import UserError
from flowseg.runs.terminal import decoded

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


Parsed = TypeVar("Parsed", bound="Section")


class Section(BaseModel):
    """Base of every section: unknown keys are errors and assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelConfig(Section):
    """The network. ``size`` names a preset; the fields that default to ``None`` each override one number of it."""

    size: str = "nano"
    condition_on_image: bool = True
    """Concatenate the image to ``x_t`` at the patch embedding."""
    pixnerd: Path | None = None
    """A PixNerd checkpoint to start from (``flowseg/model/pixnerd.py``)."""
    compile: bool = False
    """Compile the network with ``torch.compile``, as one graph."""
    activation_checkpointing: bool = False
    """Compute each block again in backward: less memory, about a third more time."""
    field_chunk: Count | None = None
    """Generate neural-field weights of about so many patches at a time (less memory); ``None``: of all at once."""
    patch_size: Count | None = None
    dim: Count | None = None
    heads: Count | None = None
    depth: Count | None = None
    field_depth: Count | None = None
    field_hidden: Count | None = None
    stem_width: Annotated[int, Field(ge=0)] | None = None
    """Channels of the first layer of a convolutional stem; 0 is PixNerd's linear patch embedding."""
    stem_depth: Annotated[int, Field(ge=0)] | None = None


class CodesConfig(Section):
    """The points in code space that stand for the classes."""

    channels: Count = 8
    """More than three scored better on two data sets (docs/results/paints.md); the published recipes have three."""
    sequence: Literal["sqrt_primes", "r_sequence", "searched", "grid", "one_hot"] = "searched"
    """``sqrt_primes`` is the paper's; ``searched`` is farther apart, and scored better (docs/results/paints.md).
    ``one_hot``: a channel a class (``channels`` must be their number); nearest code and largest channel agree."""


class FlowConfig(Section):
    """The path from source to colour-coded mask and where along it the network is trained."""

    source: Literal["image", "noise"] = "image"
    predicts: Literal["endpoint", "velocity"] = "endpoint"
    time_sampler: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = 0.0
    time_std: Positive = 1.0
    time_shift: Positive = 1.0
    """``s`` of ``t / (t + (1 - t) s)``: above 1 it moves draws towards the source."""
    zero_fraction: Fraction = 0.5
    """Share of the draws that are exactly t = 0, where ``x_t`` holds nothing of the answer. 1 trains a network that
    answers in one Euler step and no more: other ``sample.steps`` and ``sample.method`` are refused."""
    t_min: Annotated[float, Field(gt=0.0, le=0.01)] = 1e-3
    """Smallest ``1 - t`` by which the ODE solver divides an end-point prediction to get a velocity."""


class LossConfig(Section):
    """The distance-aware correction; weight 0 is plain flow matching."""

    kind: Literal["flow", "cross_entropy"] = "flow"
    """``cross_entropy`` reads the prediction's channels as class scores: a softmax head on the same network, the
    yardstick of a study. Wants ``codes.sequence=one_hot`` and ``flow.zero_fraction=1``."""
    correction_weight: Annotated[float, Field(ge=0.0)] = 1.0
    schedule: Literal["static", "annealed"] = "static"
    temperature: Positive = 1.0
    eps: Positive | None = None
    """``None``: 0.2 times the smallest squared distance between two codes."""
    transform: Literal["neg_log", "neg_sq", "neg_dist", "inverse"] = "neg_log"
    max_norm: Positive | None = None
    space: Literal["velocity", "endpoint"] | None = None
    """``None``: the space of the prediction."""


class RepaConfig(Section):
    """Alignment with a frozen image encoder while training; weight 0 is without."""

    weight: Annotated[float, Field(ge=0.0)] = 0.0
    encoder: str = "facebook/dinov2-base"
    """Name on the hub, or a folder with the encoder's files."""
    block: Count = 8
    """The transformer block behind which features are compared."""


class DataConfig(Section):
    """Where images and labels come from, and the size the network sees."""

    name: Literal["digits", "paints", "camvid", "ade20k", "cocostuff", "cityscapes", "voc", "folder"] = "digits"
    root: Path | None = None
    height: Count = 64
    width: Count = 64
    train_split: str | None = None
    """The data set's own name of the split; ``None``: its usual one, such as ``training`` of ADE20K."""
    val_split: str | None = None
    check: Literal["full", "headers", "none"] | None = None
    """What to look at before training: label values, sizes, or nothing; ``None``: values up to 6000 pairs, then sizes."""
    classes: list[str] | None = None
    palette: list[tuple[int, int, int]] | None = None
    values: list[Annotated[int, Field(ge=0, le=65535)]] | None = None
    """Label value of each class in the files, such as ``[0, 255]``. ``None``: those of the preset, or 0, 1, 2, ..."""
    ignore: list[Annotated[int, Field(ge=0, le=65535)]] | None = None
    """Label values that carry no class, besides 255 unless that is a class's value. ``None``: those of the preset."""
    exif: Literal["upright", "stored"] = "upright"
    """Images are turned as their EXIF orientation says. Their labels were drawn on what a viewer shows (``upright``), or
    on the pixels as they are stored (``stored``): then they are turned too, and ``predict`` writes masks for stored pixels."""
    white: Positive | None = None
    """Value that becomes white in images of 16 and 32 bits and of floats. ``None``: 65535, and 1.0 for floats."""
    max_megapixels: Positive = 256.0
    """Larger files are refused: a small file may hold an image that fills the memory."""
    scale_min: Positive = 1.0
    scale_max: Positive = 1.0
    flip: bool = False
    color_jitter: Fraction = 0.0
    """Largest relative change of brightness and of contrast in training."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue, each in half of the examples, as is usual for segmentation."""
    max_class_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw a crop again, up to ten times, while one class covers more than this of its labelled pixels."""
    workers: Annotated[int, Field(ge=0)] = 0
    scenes_train: Count = 4000
    """Scenes of one pass over embedded data (digits, paints)."""
    scenes_val: Count = 200

    @model_validator(mode="after")
    def _scales(self) -> DataConfig:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min ({self.scale_min:g}) must not exceed scale_max ({self.scale_max:g})")
        return self


class OptimConfig(Section):
    """AdamW, warm-up, and the schedule after it."""

    lr: Positive = 1e-3
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    warmup: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_end: Fraction = 0.02
    """Final learning rate as a share of ``lr``, unless the schedule is constant."""
    grad_clip: Positive = 1.0
    ema_decay: Fraction = 0.9999
    """Upper limit of the averaging; early on it is ``(1 + n) / (10 + n)`` after ``n`` steps."""


class Stage(Section):
    """A later part of a run at another resolution; what is ``None`` stays as it was."""

    at: Count
    """First step of the stage."""
    height: Count
    width: Count
    batch_size: Count | None = None
    lr: Positive | None = None


class TrainConfig(Section):
    """Length, batch and bookkeeping of a run."""

    steps: Count = 2000
    """All optimiser steps, those of later stages included."""
    stages: list[Stage] = []
    """Later stages in order, e.g. ``[{at: 80000, height: 512, width: 512, batch_size: 8}]``."""
    max_minutes: Positive | None = None
    """Stop after this much training time; the learning rate then follows the time used when that is further on."""
    batch_size: Count = 32
    accumulation: Count = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """``auto``: bf16 where the hardware multiplies it; ``no``: float32. The loss and the correction are float32 either way."""
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 10
    eval_every: Count = 500
    eval_images: Count | None = None
    """Validate on this many images during training; ``None``: on all."""
    checkpoint_every: Count = 500
    """A checkpoint is also written before each validation; the next one replaces it."""
    keep: Count = 2
    """Checkpoints kept, besides the best."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: a copy of the parameters in each, or the parameters spread over them (FSDP2)."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where metrics go besides ``metrics.jsonl``."""
    project: str = "flowseg"
    """Name of the project for the trackers."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        # YAML 1.1 reads an unquoted no as false.
        return "no" if value is False else value

    @model_validator(mode="after")
    def _stages_in_order(self) -> TrainConfig:
        starts = [stage.at for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages must begin one after the other, got at = {starts}")
        return self


class SampleConfig(Section):
    """The ODE solver from source to code field, the views of an image, and how the result reaches native resolution."""

    method: Literal["euler", "heun", "midpoint"] = "euler"
    steps: Annotated[int, Field(ge=1, le=100)] = 1
    """What scored best where we measured (docs/results/camvid.md); a model trained for longer may gain from more."""
    resize: Literal["fit", "cover", "native"] = "fit"
    """Size at which an image is seen: inside the training size, covering it, or its own; padded to whole patches."""
    window: Literal["whole", "slide"] = "whole"
    """The whole image at once, or windows of the training size whose class probabilities are averaged."""
    stride: Annotated[float, Field(gt=0.0, le=1.0)] = 2 / 3
    """Distance of the windows as a share of their size."""
    flip: bool = False
    """Also segment the mirrored image and average."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """Segment at each of these multiples of the size and average."""
    upsample: Literal["codes", "labels", "probabilities"] = "labels"
    weights: Literal["ema", "model"] = "ema"
    batch_size: Count = 16


class Config(Section):
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    codes: CodesConfig = CodesConfig()
    flow: FlowConfig = FlowConfig()
    loss: LossConfig = LossConfig()
    repa: RepaConfig = RepaConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.flow.source == "image" and self.codes.channels < 3:
            raise ValueError(
                "codes.channels must be at least 3 when flow.source is 'image' (an image has 3 channels and none may "
                f"be dropped), got {self.codes.channels}; set flow.source=noise or codes.channels=3"
            )
        if self.flow.source == "noise" and not self.model.condition_on_image:
            raise ValueError(
                "model.condition_on_image must be true when flow.source is 'noise': "
                "the network would never see the image"
            )
        if self.loss.kind == "cross_entropy":
            wanted = {"codes.sequence": "one_hot", "flow.predicts": "endpoint", "flow.zero_fraction": 1.0}
            for key, value in wanted.items():
                section, leaf = key.split(".")
                given = getattr(getattr(self, section), leaf)
                if given != value:
                    raise ValueError(
                        f"{key} must be {value} when loss.kind is 'cross_entropy' (a softmax head has no flow to "
                        f"follow), got {given}; add --set {key}={value}"
                    )
        if self.flow.zero_fraction == 1.0 and (self.sample.steps, self.sample.method) != (1, "euler"):
            raise ValueError(
                "sample.steps must be 1 and sample.method euler when flow.zero_fraction is 1 (the network has seen t = 0 "
                f"alone and cannot go on from there), got {self.sample.steps} of {self.sample.method}; sample with one "
                "Euler step, or train with flow.zero_fraction below 1"
            )
        return self

    def at_step(self, step: int) -> Config:
        """A copy with the size, batch and learning rate of the stage that holds ``step``."""
        config = self.model_copy(deep=True)
        for stage in self.train.stages:
            if stage.at <= step:
                config.data.height, config.data.width = stage.height, stage.width
                config.train.batch_size = stage.batch_size or config.train.batch_size
                config.optim.lr = stage.lr or config.optim.lr
        return config


def load_config(
    file: Path | str | None = None, pairs: list[str] | None = None, flags: dict[str, Any] | None = None
) -> Config:
    """Read a YAML file, then lay flags and finally ``key=value`` pairs over it.

    Args:
        file: YAML with the sections of :class:`Config`; ``None`` starts from the defaults.
        pairs: strings like ``"loss.correction_weight=0"``; values are read as YAML.
        flags: dotted keys to values; ``None`` values are skipped.

    Raises:
        UserError: unreadable file, unknown key (the nearest known one is named), or a value out of range.
    """
    tree = _read_yaml(Path(file)) if file is not None else {}
    return override(tree, pairs, flags, str(file) if file is not None else "settings")


def override(
    tree: dict[str, Any],
    pairs: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    origin: str = "settings",
) -> Config:
    """Settings of a tree of plain values with flags and pairs laid over it, as :func:`load_config` does."""
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(tree, key, value)
    for pair in pairs or []:
        key, separator, text = decoded(pair).partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set wants KEY=VALUE such as optim.lr=3e-4, got {pair!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _assign(tree, key.strip(), _number(value))
    return config_from_tree(tree, origin)


def config_from_tree(tree: dict[str, Any], origin: str = "settings") -> Config:
    """Validate a nested dictionary; errors become one :class:`UserError` line."""
    return parse_section(Config, tree, origin)


def parse_section(section: type[Parsed], tree: dict[str, Any], origin: str) -> Parsed:
    """Validate ``tree`` as a ``section``; errors become one :class:`UserError` line."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error, section)}") from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that :func:`load_config` reads back to the same values."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # On a full disk the settings that were there stay.
    try:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _OnceLoader(yaml.SafeLoader):
    """Plain YAML in which a name may stand only once at a place: the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dictionary; YAMLError for a repeated name."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file in UTF-8.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        yaml.YAMLError: not YAML, or a name that is given twice at one place.
    """
    return yaml.load(path.read_text(encoding="utf-8-sig"), _OnceLoader)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path) or {}
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: wants sections such as 'optim:' at the top, got {type(tree).__name__}")
    # A section without settings.
    return {key: value for key, value in tree.items() if value is not None}


def _number(value: Any) -> Any:
    # YAML 1.1 reads "3e-4" as a string because it has no dot.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"setting {key!r}: {section!r} is a value, not a section")
        node = child
    node[leaf] = value


def _explain(error: ValidationError, section: type[Section]) -> str:
    # A misspelt field is also a missing one; its name says more.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        hint = _nearest(key) if section is Config else _hint(key, {name: name for name in section.model_fields})
        return f"unknown setting {key!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return message if not key or "." in message.split(" ")[0] else f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def known_keys() -> list[str]:
    """Every dotted setting, e.g. ``"optim.lr"``."""
    return [f"{section}.{leaf}" for section, keys in Config().model_dump().items() for leaf in keys]


def _nearest(key: str) -> str:
    """A hint: the setting that may have been meant or, where none is alike, those there are at its place."""
    section, leaf = key.split(".", 1)[0], key.rsplit(".", 1)[-1]
    if key.startswith("train.stages."):
        return _hint(leaf, {name: f"train.stages: {name}" for name in Stage.model_fields})
    sections = {name: name for name in Config.model_fields}
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known_keys()}
    inside = {name.split(".", 1)[1]: name for name in known_keys() if name.startswith(section + ".")}
    for names in (sections if not inside else {}, {leaf: by_leaf[leaf]} if leaf in by_leaf else {}, inside, by_leaf):
        if difflib.get_close_matches(leaf if inside else section, names, n=1):
            return _hint(leaf if inside else section, names)
    return _hint("", inside or sections)


def _hint(name: str, names: dict[str, str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {names[close[0]]!r}?" if close else f"there are {', '.join(names.values())}"
