"""The validated settings of a run: one tree of small sections, read from YAML, flags and ``key=value`` pairs."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowseg.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors and assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelConfig(Section):
    """The network. ``size`` names a preset; every other field but two overrides one number of that preset."""

    size: str = "nano"
    condition_on_image: bool = True
    """Concatenate the image to ``x_t`` at the patch embedding."""
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

    channels: Count = 3
    sequence: Literal["sqrt_primes", "r_sequence", "searched", "grid"] = "sqrt_primes"


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
    """Share of the draws that are exactly t = 0, where ``x_t`` holds nothing of the answer."""
    t_min: Annotated[float, Field(gt=0.0, le=0.01)] = 1e-3
    """Smallest ``1 - t`` by which the ODE solver divides an end-point prediction to get a velocity."""


class LossConfig(Section):
    """The distance-aware correction; weight 0 is plain flow matching."""

    correction_weight: Annotated[float, Field(ge=0.0)] = 1.0
    schedule: Literal["static", "annealed"] = "static"
    temperature: Positive = 1.0
    eps: Positive | None = None
    """``None``: 0.2 times the smallest squared distance between two codes."""
    transform: Literal["neg_log", "neg_sq", "neg_dist", "inverse"] = "neg_log"
    max_norm: Positive | None = None
    space: Literal["velocity", "endpoint"] | None = None
    """``None``: the space of the prediction."""


class DataConfig(Section):
    """Where images and labels come from, and the size the network sees."""

    name: Literal["digits", "camvid", "folder"] = "digits"
    root: Path | None = None
    height: Count = 64
    width: Count = 64
    train_split: str = "train"
    val_split: str = "val"
    classes: list[str] | None = None
    palette: list[tuple[int, int, int]] | None = None
    ignore: list[Annotated[int, Field(ge=0, le=65535)]] | None = None
    """Label values that carry no class, besides 255. ``None``: those of the preset."""
    scale_min: Positive = 1.0
    scale_max: Positive = 1.0
    flip: bool = False
    color_jitter: Fraction = 0.0
    """Largest relative change of brightness and of contrast in training."""
    workers: Annotated[int, Field(ge=0)] = 0
    digits_train: Count = 4000
    """Scenes of one pass over the embedded data."""
    digits_val: Count = 200

    @model_validator(mode="after")
    def _scales(self) -> DataConfig:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min ({self.scale_min:g}) must not exceed scale_max ({self.scale_max:g})")
        return self


class OptimConfig(Section):
    """AdamW without weight decay, warm-up, and the schedule after it."""

    lr: Positive = 1e-3
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    warmup: Annotated[int, Field(ge=0)] = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_end: Fraction = 0.02
    """Final learning rate as a share of ``lr`` (cosine only)."""
    grad_clip: Positive = 1.0
    ema_decay: Fraction = 0.9999
    """Upper limit of the averaging; early on it is ``(1 + n) / (10 + n)`` after ``n`` steps."""


class TrainConfig(Section):
    """Length, batch and bookkeeping of a run."""

    steps: Count = 2000
    max_minutes: Positive | None = None
    """Stop after this much training time; the learning rate then follows the time used when that is further on."""
    batch_size: Count = 32
    accumulation: Count = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """``auto``: bf16 where the hardware multiplies it. The loss and the correction are float32 either way."""
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 10
    eval_every: Count = 500
    eval_images: Count | None = None
    """Validate on this many images during training; ``None``: on all."""
    checkpoint_every: Count = 500
    keep: Count = 2
    """Checkpoints kept, besides the best."""


class SampleConfig(Section):
    """The ODE solver from source to code field, and how the field reaches native resolution."""

    method: Literal["euler", "heun", "midpoint"] = "euler"
    steps: Annotated[int, Field(ge=1, le=100)] = 2
    upsample: Literal["codes", "labels", "probabilities"] = "labels"
    weights: Literal["ema", "model"] = "ema"
    batch_size: Count = 16


class Config(Section):
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    codes: CodesConfig = CodesConfig()
    flow: FlowConfig = FlowConfig()
    loss: LossConfig = LossConfig()
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
        return self


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
    origin = str(file) if file is not None else "settings"
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(tree, key, value)
    for pair in pairs or []:
        key, separator, text = pair.partition("=")
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
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that :func:`load_config` reads back to the same values."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # On a full disk the settings that were there stay.
    try:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: wants sections such as 'optim:' at the top, got {type(tree).__name__}")
    return tree


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


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown setting {key!r}; did you mean {_nearest(key)!r}?"
    message = first["msg"].removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return message if not key or "." in message.split(" ")[0] else f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def known_keys() -> list[str]:
    """Every dotted setting, e.g. ``"optim.lr"``."""
    return [f"{section}.{leaf}" for section, keys in Config().model_dump().items() for leaf in keys]


def _nearest(key: str) -> str:
    keys = known_keys()
    sections = list(Config.model_fields)
    section = key.split(".", 1)[0]
    if section not in sections and difflib.get_close_matches(section, sections, n=1):
        return difflib.get_close_matches(section, sections, n=1)[0]
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in keys}
    if leaf in by_leaf:
        return by_leaf[leaf]
    inside = {name.split(".", 1)[1]: name for name in keys if name.startswith(section + ".")}
    for names in (inside, by_leaf):
        close = difflib.get_close_matches(leaf, list(names), n=1, cutoff=0.5)
        if close:
            return names[close[0]]
    return difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
