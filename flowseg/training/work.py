"""The work of a whole run in FLOPs, stage by stage, for estimates of its time before it starts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from flowseg.config import Config
from flowseg.model.flops import Flops, count_flops
from flowseg.model.sizes import ModelSize, check_sizes, resolve_size
from flowseg.training.batches import examples_per_step

# Width and depth of the public DINOv2 encoders, so that an estimate needs no look-up on the hub.
_DINOV2 = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}


@dataclasses.dataclass(frozen=True)
class StageWork:
    """Work of one stage of a run; FLOPs are per image.

    Attributes:
        first, last: the stage has the steps ``first + 1`` to ``last``.
        height, width: size of its images.
        images: examples that all processes together draw in the stage.
        flops: FLOPs of the network.
        alignment: FLOPs of REPA: the encoder's forward, and the projector. They are work, but not model FLOPs. 0 without
            REPA, ``None`` if the encoder's size is not known.
    """

    first: int
    last: int
    height: int
    width: int
    images: int
    flops: Flops
    alignment: int | None

    @property
    def per_image(self) -> int:
        """All FLOPs of a training step per image: model FLOPs, recomputation and REPA."""
        return self.flops.training + self.flops.recomputed + (self.alignment or 0)

    @property
    def total(self) -> int:
        """All FLOPs of the stage."""
        return self.images * self.per_image

    @property
    def model_flops(self) -> int:
        """Model FLOPs of the stage, which ``model_tflops_per_second`` of the training log counts."""
        return self.images * self.flops.training


def work_of(config: Config, processes: int = 1) -> list[StageWork]:
    """Work of a run up to ``train.steps``, one entry per stage. Validations are left out.

    Args:
        config: settings of the run.
        processes: number of processes; ``train.batch_size`` is per process.

    Raises:
        UserError: an unknown network size, or training sizes that are not multiples of its patch size.
    """
    check_sizes(config, resolve_size(config.model).patch_size)
    starts = [0, *(stage.at for stage in config.train.stages if stage.at < config.train.steps), config.train.steps]
    stages = []
    for first, last in itertools.pairwise(starts):
        stage = config.at_step(first)
        height, width = stage.data.height, stage.data.width
        images = (last - first) * examples_per_step(stage, processes)
        stages.append(StageWork(first, last, height, width, images, count_flops(stage), alignment_flops(stage)))
    return stages


def alignment_flops(config: Config) -> int | None:
    """FLOPs of REPA for one image of ``data.height`` x ``data.width``: the encoder's forward, and the projector's training.

    Returns:
        0 without REPA; ``None`` if ``repa.encoder`` is neither a public DINOv2 nor a folder with its ``config.json``.
    """
    if not config.repa.weight:
        return 0
    encoder = _encoder_shape(config.repa.encoder)
    if encoder is None:
        return None
    size = resolve_size(config.model)
    patches = (config.data.height // size.patch_size) * (config.data.width // size.patch_size)
    return _encoder_flops(encoder, patches) + 3 * _projector_flops(size, encoder.dim, patches)


@dataclasses.dataclass(frozen=True)
class _EncoderShape:
    dim: int
    depth: int
    patch: int = 14
    mlp_ratio: float = 4
    leading: int = 1
    """Number of tokens that are no patches."""


def _encoder_shape(name: str) -> _EncoderShape | None:
    family, _, scale = name.removeprefix("facebook/").rpartition("-")
    if family in ("dinov2", "dinov2-with-registers") and scale in _DINOV2:
        return _EncoderShape(*_DINOV2[scale], leading=5 if family.endswith("registers") else 1)
    try:
        facts = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        patch, ratio, registers = facts["patch_size"], facts.get("mlp_ratio", 4), facts.get("num_register_tokens", 0)
        patch = patch if isinstance(patch, int) else patch[0]
        return _EncoderShape(facts["hidden_size"], facts["num_hidden_layers"], patch, ratio, 1 + registers)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encoder_flops(encoder: _EncoderShape, patches: int) -> int:
    """FLOPs of a forward. The gated MLP of the giant DINOv2 has as many products as a plain one, within rounding."""
    dim, tokens = encoder.dim, patches + encoder.leading
    block = round((4 + 2 * encoder.mlp_ratio) * dim**2) * tokens + 2 * tokens**2 * dim
    return 2 * (patches * 3 * encoder.patch**2 * dim + encoder.depth * block)


def _projector_flops(size: ModelSize, out: int, patches: int) -> int:
    """FLOPs of a forward of :class:`flowseg.model.backbone.Projector`; its backward has twice as many."""
    return 2 * patches * (2 * size.dim**2 + size.dim * out)


def amount(flops: float) -> str:
    """Three digits and a prefix, such as ``2.25 TFLOP``."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    # 999.5 would be shown as 1e+03.
    while flops >= 999.5 and len(prefixes) > 1:
        flops /= 1000
        prefixes.pop(0)
    return f"{flops:,.0f}" * (flops >= 99.95) + f"{flops:#.3g}" * (flops < 99.95) + f" {prefixes[0]}FLOP"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, such as ``43.2 hours`` or ``0.305 seconds``."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} seconds"
