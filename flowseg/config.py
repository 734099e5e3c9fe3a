"""The settings of a run: a tree of small validated sections, read from YAML, flags and ``key=value`` pairs."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flowseg.data_names import DATA_NAMES
from flowseg.errors import UserError
from flowseg.runs.files import write_whole
from flowseg.runs.terminal import decoded

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
LARGEST_LABEL_VALUE = 65535
"""Largest label value in files, which have at most 16 bits."""


Parsed = TypeVar("Parsed", bound="Section")


class Section(BaseModel):
    """Base of every section: unknown keys are errors and assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelConfig(Section):
    """The network. ``size`` names a preset; each field from ``patch_size`` on replaces one number of the preset."""

    size: str = "nano"
    """``nano``, ``S/16``, ``B/16``, ``L/16`` or ``XL/16``: 3, 46, 156, 453 and 702 M parameters at 8 code channels."""
    condition_on_image: bool = True
    """Concatenate the image with ``x_t`` before the patch embedding."""
    pixnerd: Path | None = None
    """PixNerd checkpoint to start training from (``flowseg/model/pixnerd.py``)."""
    compile: bool = False
    """Compile the network with ``torch.compile``: as one graph, or block by block with ``train.strategy=fsdp``. Validation
    and ``evaluate`` compile it too, for images and windows of the training size."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a quarter more FLOPs (``flowseg flops`` counts them)."""
    field_chunk: Count | None = None
    """Generate the neural-field weights of this many patches at a time (fewer need less memory); ``None``: of all."""
    head_features: Annotated[int, Field(ge=3)] | None = None
    """Only with ``loss.kind=cross_entropy``: the neural field gives this many features per pixel, and a linear layer gives the
    class scores. ``None``: the field itself gives the scores, and the network reads an empty channel per class."""
    patch_size: Count | None = None
    dim: Count | None = None
    heads: Count | None = None
    depth: Count | None = None
    field_depth: Count | None = None
    field_hidden: Count | None = None
    stem_width: Annotated[int, Field(ge=0)] | None = None
    """Channels of the first layer of a convolutional stem; 0 selects PixNerd's linear patch embedding."""
    stem_depth: Annotated[int, Field(ge=0)] | None = None


class CodesConfig(Section):
    """The codes: one point in code space per class."""

    channels: Count = 8
    """Number of channels. More than three scored better on two data sets (docs/results/paints.md); the paper uses three."""
    sequence: Literal["sqrt_primes", "r_sequence", "searched", "grid", "one_hot"] = "searched"
    """``sqrt_primes`` is the paper's; codes of ``searched`` are farther apart and scored better (docs/results/paints.md).
    ``one_hot``: one channel per class (``channels`` must be the number of classes); the nearest code is then the largest
    channel."""


class FlowConfig(Section):
    """The path from the source to the colour-coded mask, and the times at which the network is trained."""

    source: Literal["image", "noise"] = "image"
    """State at t = 0: the image followed by channels of zeros, or Gaussian noise."""
    predicts: Literal["endpoint", "velocity"] = "endpoint"
    """Output of the network: the state at t = 1, or the velocity ``dx/dt``."""
    time_sampler: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times. ``logit_normal``: the sigmoid of a Gaussian with ``time_mean`` and ``time_std``."""
    time_mean: float = 0.0
    time_std: Positive = 1.0
    time_shift: Positive = 1.0
    """``s`` in ``t / (t + (1 - t) s)``: values above 1 move times towards the source."""
    zero_fraction: Fraction = 0.5
    """Share of the times that are exactly t = 0, where ``x_t`` contains nothing of the answer. 1 trains a network for a
    single Euler step: other values of ``sample.steps`` and ``sample.method`` are then errors."""
    t_min: Annotated[float, Field(gt=0.0, le=0.01)] = 1e-3
    """Lower limit of the ``1 - t`` by which the ODE solver divides to turn an end-point prediction into a velocity.
    The loss has its own ``t_min``, 0.05."""


class LossConfig(Section):
    """The loss. ``correction_weight=0`` switches the distance-aware correction off: plain flow matching."""

    kind: Literal["flow", "cross_entropy"] = "flow"
    """``cross_entropy`` treats the channels of the prediction as class scores, a baseline for studies: the same network
    with a softmax head. It requires ``codes.sequence=one_hot`` and ``flow.zero_fraction=1``."""
    correction_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the distance-aware correction."""
    schedule: Literal["static", "annealed"] = "static"
    """Weight over time: the same at every t, or multiplied by ``1 - t``."""
    temperature: Positive = 1.0
    """Divisor of the logits of the classes: small values make the correction act between the nearest classes only."""
    eps: Positive | None = None
    """``None``: 0.2 times the smallest squared distance between two codes."""
    transform: Literal["neg_log", "neg_sq", "neg_dist", "inverse"] = "neg_log"
    """Logit of a class from the squared distance ``d`` to its code: ``-log(d + eps)``, ``-d``, ``-sqrt(d + eps)`` or
    ``1 / (d + eps)``."""
    max_norm: Positive | None = None
    """Largest norm of the correction at a pixel; longer ones are shortened to it. ``None``: no limit."""
    space: Literal["velocity", "endpoint"] | None = None
    """``None``: the space of the prediction."""


class RepaConfig(Section):
    """Alignment of features with a frozen image encoder during training; weight 0 switches it off."""

    weight: Annotated[float, Field(ge=0.0)] = 0.0
    encoder: str = "facebook/dinov2-base"
    """Name on the Hugging Face hub, or a folder with the encoder's files."""
    block: Count = 8
    """Number of the transformer block after which features are compared."""


class DataConfig(Section):
    """The data set, the size at which the network sees it, and the augmentation."""

    name: Literal[DATA_NAMES] = "digits"
    root: Path | None = None
    height: Count = 64
    width: Count = 64
    train_split: str | None = None
    """The data set's own name of the training split; ``None``: the usual name, such as ``training`` for ADE20K."""
    val_split: str | None = None
    check: Literal["full", "headers", "none"] | None = None
    """Check of the files before training: label values (``full``), sizes (``headers``) or nothing. ``None``: ``full`` for up
    to 6000 pairs, else ``headers``."""
    classes: list[str] | None = None
    """Names of up to 65,535 classes, or the path of a text file with one name per line, which is read at once: a run keeps the
    names, not the path."""
    palette: list[tuple[int, int, int]] | None = None
    values: list[Annotated[int, Field(ge=0, le=LARGEST_LABEL_VALUE)]] | None = None
    """Label value of each class in the files, such as ``[0, 255]`` or ``[1-1203]``. ``None``: those of the data set, or
    0, 1, 2, ..."""
    ignore: list[Annotated[int, Field(ge=0, le=LARGEST_LABEL_VALUE)]] | None = None
    """Label values to ignore, such as ``[0, 1204-65534]``. 255, or 65535 with more than 255 classes, is always ignored unless
    it is the value of a class. ``None``: those of the data set."""
    exif: Literal["upright", "stored"] = "upright"
    """How label maps were drawn: on the image as a viewer shows it (``upright``) or on its stored pixels (``stored``).
    Images are always turned by their EXIF orientation. With ``stored`` label maps are turned too, and ``predict`` writes
    masks for the stored pixels."""
    white: Positive | None = None
    """Value that becomes white in images of 16 bits, 32 bits or floats. ``None``: 65535, and 1.0 for floats."""
    max_megapixels: Positive = 256.0
    """Larger images are refused: a small file can decode to an image that fills the memory."""
    scale_min: Positive = 1.0
    scale_max: Positive = 1.0
    flip: bool = False
    color_jitter: Fraction = 0.0
    """Largest relative change of brightness and of contrast in training."""
    photometric: bool = False
    """Change brightness, contrast, saturation and hue at random, each in half of the examples."""
    max_class_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Largest share of a crop's labelled pixels that one class may cover. Other crops are drawn again, up to ten times."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """In training, the number of worker processes that load for each training process; 0: it loads by itself. ``None``: 0
    without a GPU; with one, on Linux, the number of cores of the process, at most 8, or fewer if their batches would fill
    /dev/shm. In evaluation, the number of threads that read images, at most 16; ``None``: one per core of the process."""
    num_classes: Annotated[int, Field(ge=2, le=LARGEST_LABEL_VALUE)] | None = None
    """Number of classes of paints, up to 65,535; ``None``: 48. No other data set has a choice."""
    scenes_train: Count = 4000
    """Number of scenes per epoch of generated data (digits, paints)."""
    scenes_val: Count = 200

    @field_validator("classes", mode="before")
    @classmethod
    def _names_of_file(cls, value: Any) -> Any:
        return _read_names(Path(value)) if isinstance(value, str | Path) else value

    @field_validator("values", "ignore", mode="before")
    @classmethod
    def _without_ranges(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not any(isinstance(item, str) for item in value):
            return value
        return [number for item in value for number in (_numbers(item) if isinstance(item, str) else [item])]

    @model_validator(mode="after")
    def _scales(self) -> DataConfig:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min ({self.scale_min:g}) must not exceed scale_max ({self.scale_max:g})")
        return self


def _read_names(path: Path) -> list[str]:
    """Class names from a text file in UTF-8, one a line; empty lines may only follow the last name."""
    try:
        path = path.expanduser()
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: no home folder of a user.
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"data.classes: wanted a list of names or a text file with one name per line; {str(path)!r} cannot be read as text "
            f"({reason}); write a list, such as data.classes=[{path}], or give the path of a file"
        ) from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise ValueError(f"data.classes: {path}, line {line} is empty; wanted one class name per line")
    return names


def _numbers(text: str) -> list[int | str]:
    """The whole numbers of a range such as ``1-1203``; any other text as it is."""
    first, dash, last = text.partition("-")
    if not (dash and first.strip().isdecimal() and last.strip().isdecimal()):
        return [text]
    first, last = int(first), int(last)
    # Validation of the ends suffices to refuse the range.
    return [text] if first > last else [first, last] if last > LARGEST_LABEL_VALUE else list(range(first, last + 1))


class OptimConfig(Section):
    """AdamW, and the warm-up and schedule of its learning rate."""

    lr: Positive = 1e-3
    """Largest learning rate, at the end of the warm-up."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    warmup: Annotated[int, Field(ge=0)] = 100
    """Number of steps in which the learning rate grows linearly to ``lr``."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_end: Fraction = 0.02
    """Final learning rate as a share of ``lr``; a constant schedule ignores it."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient of all parameters; longer gradients are shortened to it."""
    ema_decay: Fraction = 0.9999
    """Decay of the averaged weights; after ``n`` early steps it is ``(1 + n) / (10 + n)`` if that is smaller."""


class Stage(Section):
    """A later part of a run at another resolution; a field that is ``None`` keeps the value of the stage before."""

    at: Count
    """First step of the stage."""
    height: Count
    width: Count
    batch_size: Count | None = None
    lr: Positive | None = None


class TrainConfig(Section):
    """Length, batches, validation and checkpoints of a run."""

    steps: Count = 2000
    """Number of optimiser steps, including those of later stages."""
    stages: list[Stage] = []
    """Later stages in order, such as ``[{at: 80000, height: 512, width: 512, batch_size: 8}]``."""
    max_minutes: Positive | None = None
    """Stop after this many minutes of training. The learning rate follows time or steps, whichever is closer to its end."""
    batch_size: Count = 32
    """Images in a forward pass of each process."""
    accumulation: Count = 1
    """Forward passes of each process in one optimiser step."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """``auto``: bf16 if the hardware has bf16 products; ``no``: float32. Loss and correction are always computed in float32."""
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 10
    """Steps between two lines in ``metrics.jsonl``."""
    eval_every: Count = 500
    """Steps between validations."""
    eval_images: Count | None = None
    """Number of images per validation during training; ``None``: all."""
    checkpoint_every: Count = 500
    """Steps between checkpoints. Another one is written before each validation, and the next checkpoint replaces it."""
    keep: Count = 2
    """Number of newest checkpoints to keep, in addition to the best weights."""
    checkpoint: Literal["whole", "sharded"] = "whole"
    """``whole``: the first process writes a checkpoint. ``sharded``: each process writes its part of it, and all machines must
    share the file system of ``--out``. A run of one process always writes whole checkpoints."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Parameters of several processes: a copy in each (``ddp``), or sharded over all (``fsdp``, which is FSDP2)."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Trackers that get the metrics in addition to ``metrics.jsonl``."""
    project: str = "flowseg"
    """Project name for the trackers."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _false_is_no(cls, value: Any) -> Any:
        # YAML 1.1 reads an unquoted no as false.
        return "no" if value is False else value

    @model_validator(mode="after")
    def _stages_in_order(self) -> TrainConfig:
        starts = [stage.at for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages must start at increasing steps, got at = {starts}")
        return self


class SampleConfig(Section):
    """Inference: the ODE solver, the views of an image that are averaged, and the step to native resolution."""

    method: Literal["euler", "heun", "midpoint"] = "euler"
    steps: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of solver steps. One scored best in our runs (docs/results/camvid.md); longer training may favour more."""
    resize: Literal["fit", "cover", "native"] = "fit"
    """Size at which the network sees an image, apart from padding to whole patches: the largest inside the training size
    (``fit``), the smallest that covers it (``cover``), or the image's own."""
    window: Literal["whole", "slide"] = "whole"
    """Segment the whole image at once, or average the class probabilities of windows of the training size."""
    stride: Annotated[float, Field(gt=0.0, le=1.0)] = 2 / 3
    """Distance between neighbouring windows as a share of their size."""
    flip: bool = False
    """Average with the result for the mirrored image."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """Multiples of the size to segment at; the results are averaged."""
    upsample: Literal["codes", "labels", "probabilities"] = "labels"
    """What is resized to the image's own size: codes (then decoded), labels (nearest neighbour) or class probabilities."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, or those of the last step."""
    batch_size: Count = 16
    """Images of equal size that the network sees at once."""
    cuda_graph: bool = False
    """Replay the solver's loop as a CUDA graph. A graph is recorded when a number and size of images comes for the second
    time. At most 8 graphs are kept, and each keeps the memory of one call. Without a CUDA GPU this changes nothing."""


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
        features = self.model.head_features
        if features is not None and (self.loss.kind != "cross_entropy" or features > self.codes.channels):
            raise ValueError(
                "model.head_features is for a softmax head (loss.kind=cross_entropy) of at least as many classes "
                f"(codes.channels), got {features} with {self.loss.kind} and {self.codes.channels}; remove it"
            )
        if self.loss.kind == "cross_entropy":
            wanted = {"codes.sequence": "one_hot", "flow.predicts": "endpoint", "flow.zero_fraction": 1.0}
            given = self.flat()
            for key, value in wanted.items():
                if given[key] != value:
                    raise ValueError(
                        f"{key} must be {value} when loss.kind is 'cross_entropy' (a softmax head has no flow to "
                        f"follow), got {given[key]}; add --set {key}={value}"
                    )
        if self.flow.zero_fraction == 1.0 and (self.sample.steps, self.sample.method) != (1, "euler"):
            raise ValueError(
                "sample.steps must be 1 and sample.method euler when flow.zero_fraction is 1 (the network was trained at "
                f"t = 0 only), got {self.sample.steps} of {self.sample.method}; sample with one Euler step, or train with "
                "flow.zero_fraction below 1"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """``{"section.name": value}`` for all settings, with values as YAML and JSON represent them."""
        tree = self.model_dump(mode="json")
        return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}

    def at_step(self, step: int) -> Config:
        """A copy with the size, batch size and learning rate of the stage that contains ``step``."""
        # Class names and label values are shared, not copied: thousands of them would take longer than a small step.
        shared = (self.data.classes, self.data.palette, self.data.values, self.data.ignore)
        config = copy.deepcopy(self, {id(part): part for part in shared if part is not None})
        for stage in self.train.stages:
            if stage.at <= step:
                config.data.height, config.data.width = stage.height, stage.width
                config.train.batch_size = stage.batch_size or config.train.batch_size
                config.optim.lr = stage.lr or config.optim.lr
        return config


def load_config(
    file: Path | str | None = None, pairs: list[str] | None = None, flags: dict[str, Any] | None = None
) -> Config:
    """Read settings: defaults, replaced by a YAML file, then by flags, then by ``key=value`` pairs.

    Args:
        file: YAML with the sections of :class:`Config`; ``None``: only the defaults.
        pairs: strings like ``"loss.correction_weight=0"``; values are parsed as YAML.
        flags: dotted keys to values; a value of ``None`` is skipped.

    Raises:
        UserError: an unreadable file, an unknown key (the message suggests the nearest one), or an invalid value.
    """
    tree = _read_yaml(Path(file)) if file is not None else {}
    return override(tree, pairs, flags, str(file) if file is not None else "settings")


def override(
    tree: dict[str, Any],
    pairs: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    origin: str = "settings",
) -> Config:
    """Settings from a tree of plain values, replaced by flags, then by pairs, as in :func:`load_config`.

    Args:
        tree: sections to names to values; it is changed.
        pairs, flags: as for :func:`load_config`.
        origin: where the tree comes from, for error messages.
    """
    origins = {}
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(tree, key, value)
            origins[key] = "settings"
    for pair in pairs or []:
        key, separator, text = decoded(pair).partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set needs KEY=VALUE such as optim.lr=3e-4, got {pair!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        key = key.strip()
        _assign(tree, key, _number(value))
        origins[key] = "--set"
    return parse_section(Config, tree, origin, origins)


def config_from_tree(tree: dict[str, Any], origin: str = "settings") -> Config:
    """Validate a nested dictionary; an error becomes a :class:`UserError` of one line."""
    return parse_section(Config, tree, origin)


def parse_section(
    section: type[Parsed], tree: dict[str, Any], origin: str, origins: dict[str, str] | None = None
) -> Parsed:
    """Validate ``tree`` as a ``section``; an error becomes a :class:`UserError` of one line.

    Args:
        section: the class to validate as.
        tree: the values.
        origin: where the tree comes from, for the message.
        origins: dotted keys to where their values come from, if that is elsewhere.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{_origin(error, origin, origins or {})}: {_explain(error, section)}") from None


def _origin(error: ValidationError, origin: str, origins: dict[str, str]) -> str:
    """Where the wrong value comes from; ``"settings"`` for a conflict of several values that may come from several places."""
    first = _first(error)
    place = [str(part) for part in first["loc"]]
    for length in range(len(place), 0, -1):
        if ".".join(place[:length]) in origins:
            return origins[".".join(place[:length])]
    if first["type"] == "extra_forbidden" and len(place) == 1:
        # An unknown section is an error of the section, not of the key in it that was given.
        return next((where for key, where in origins.items() if key.split(".")[0] == place[0]), origin)
    return "settings" if origins and len(place) < 2 else origin


def save_config(config: Config, path: Path) -> None:
    """Write all settings as YAML, from which :func:`load_config` reads the same values."""
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


class _OnceLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML loader that rejects a repeated key: PyYAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a dictionary; raise YAMLError for a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file in UTF-8.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        yaml.YAMLError: not YAML, or a repeated key.
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
        raise UserError(f"--config {path}: must contain sections such as 'optim:', got {type(tree).__name__}")
    # A section without settings is read as None.
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


def _first(error: ValidationError) -> Any:
    # A misspelt required field gives two errors, unknown and missing; the unknown name is more helpful.
    return min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")


def _explain(error: ValidationError, section: type[Section]) -> str:
    first = _first(error)
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        hint = _nearest(key) if section is Config else _hint(key, {name: name for name in section.model_fields})
        return f"unknown setting {key!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if not key or first["type"] == "value_error":
        return message if not key or "." in message.split(" ")[0] else f"{key}: {message}"
    hint = f"; write a list, such as {key}=[{first['input']}]" if first["type"] == "list_type" else ""
    if first["type"] == "int_parsing" and location[-2:-1] in (["values"], ["ignore"]):
        hint = "; write whole numbers, or ranges such as 1-1203"
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}{hint}"


def shortened(value: Any) -> Any:
    """A value of a setting to show: a list of more than 255 items becomes a text with its first ones."""
    if not isinstance(value, list) or len(value) <= 255:
        return value
    return f"{len(value)} items: {', '.join(map(str, value[:20]))}, ..."


def known_keys() -> list[str]:
    """Dotted names of all settings, such as ``"optim.lr"``."""
    return list(Config().flat())


def _nearest(key: str) -> str:
    """A hint: the most similar setting or, if none is similar, the settings that exist there."""
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
