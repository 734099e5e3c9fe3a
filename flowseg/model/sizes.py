"""Named sizes of the network."""

from __future__ import annotations

import dataclasses
import difflib

from flowseg.config import Config, ModelConfig
from flowseg.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Widths and depths of one network.

    Attributes:
        patch_size: side of a patch in pixels.
        dim: width D of a patch feature.
        heads: number of attention heads; ``dim / heads`` must be a multiple of 4 for the 2-D rotary embedding.
        depth: number of transformer blocks.
        field_depth: number of blocks of the neural field.
        field_hidden: width Hx of the neural field.
        stem_width: channels of the first layer of a convolutional stem; 0 for PixNerd's linear patch embedding.
        stem_depth: number of 3x3 convolutions between patches at the end of the stem.
    """

    patch_size: int
    dim: int
    heads: int
    depth: int
    field_depth: int
    field_hidden: int = 64
    stem_width: int = 0
    stem_depth: int = 2


# L/16 and XL/16 are PixNerd's (arXiv 2507.23268). S and B have the usual widths of a ViT. nano is ours, for training on a CPU.
SIZES = {
    "nano": ModelSize(patch_size=16, dim=128, heads=4, depth=6, field_depth=1, field_hidden=32, stem_width=32),
    "S/16": ModelSize(patch_size=16, dim=384, heads=6, depth=12, field_depth=2),
    "B/16": ModelSize(patch_size=16, dim=768, heads=12, depth=12, field_depth=2),
    "L/16": ModelSize(patch_size=16, dim=1024, heads=16, depth=22, field_depth=2),
    "XL/16": ModelSize(patch_size=16, dim=1152, heads=16, depth=26, field_depth=4),
}


def resolve_size(config: ModelConfig) -> ModelSize:
    """The preset ``config.size`` with the fields replaced that ``config`` sets.

    Raises:
        UserError: an unknown preset, or widths that do not fit each other.
    """
    name = config.size if config.size in SIZES else f"{config.size}/16"
    if name not in SIZES:
        near = difflib.get_close_matches(config.size, SIZES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.size must be one of {', '.join(SIZES)}, got {config.size!r}{hint}")
    fields = [field.name for field in dataclasses.fields(ModelSize)]
    given = {field: value for field in fields if (value := getattr(config, field)) is not None}
    size = dataclasses.replace(SIZES[name], **given)
    if size.dim % size.heads or (size.dim // size.heads) % 4:
        raise UserError(
            f"model.dim / model.heads must be a multiple of 4 (2-D rotary embedding), got {size.dim} / {size.heads}"
        )
    if size.stem_width and size.patch_size & (size.patch_size - 1):
        raise UserError(
            f"model.patch_size must be a power of two with a convolutional stem, got {size.patch_size}; "
            "set model.stem_width=0 for the linear patch embedding"
        )
    return size


def check_sizes(config: Config, patch: int) -> None:
    """Refuse training sizes, also of later stages, that are not multiples of the patch size.

    Raises:
        UserError: such a size; the message names the setting and the nearest multiple.
    """
    for step in (0, *(stage.at for stage in config.train.stages)):
        data = config.at_step(step).data
        for name in ("height", "width"):
            value = getattr(data, name)
            if value % patch:
                near = max(patch, round(value / patch) * patch)
                place = f"train.stages at {step}: {name}" if step else f"data.{name}"
                raise UserError(f"{place} must be a multiple of the patch size {patch}, got {value}; try {near}")
