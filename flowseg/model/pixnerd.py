"""Load the weights of a published PixNerd model (arXiv 2507.23268) into our network; its tensors have other names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowseg.errors import UserError
from flowseg.model.backbone import FlowSegModel

# The averaged weights come first: PixNerd's published results use them.
PREFIXES = ("ema_denoiser.", "denoiser.", "ema_model.", "model.", "module.", "")

_RENAMED = (
    (r"s_embedder\.proj\.", "patch_embed.proj."),
    (r"t_embedder\.mlp\.", "time_embed.mlp."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.attention_norm."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.mlp_norm."),
    (r"(blocks\.\d+)\.attn\.qkv\.", r"\1.attention.qkv."),
    (r"(blocks\.\d+)\.attn\.q_norm\.", r"\1.attention.query_norm."),
    (r"(blocks\.\d+)\.attn\.k_norm\.", r"\1.attention.key_norm."),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.attention.out."),
    (r"(blocks\.\d+)\.mlp\.w2\.", r"\1.mlp.out."),
    (r"(blocks\.\d+)\.adaLN_modulation\.(?:0|1)\.", r"\1.modulation."),
    (r"(x_embedder|final_layer)\.", r"decoder.\1."),
)
_CLASS_TABLE = "y_embedder.embedding_table.weight"


@dataclasses.dataclass
class LoadReport:
    """Result for every tensor.

    Attributes:
        loaded: our tensors that were filled from PixNerd's weights.
        widened: those of them that have more inputs here (code channels, the concatenated image); added columns are 0.
        missing: our tensors that PixNerd's weights lack; they keep their initial values.
        unexpected: tensors of PixNerd that our network lacks.
        mismatched: our tensors with an incompatible shape, with both shapes.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    widened: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for title in ("widened", "missing", "unexpected", "mismatched"):
            names = getattr(self, title)
            if names:
                lines.append(f"{len(names)} {title}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
        return "; ".join(lines)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file or of a file of ``torch.save``; nothing but tensors is unpickled.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({reason}); give a .safetensors or .ckpt file"
        ) from None
    for name in ("state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping):
            tree = tree[name]
    return {name: value for name, value in tree.items() if isinstance(value, Tensor)}


def load_pixnerd(model: FlowSegModel, source: Path | str | Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Fill ``model`` with PixNerd's weights.

    PixNerd's class table is ignored: segmentation has no class condition. A linear layer with more inputs than PixNerd's
    gets zeros for the added inputs, so before training the network computes the same function of ``x_t`` as PixNerd. The
    last layer keeps its initial weights if the number of code channels differs from PixNerd's 3.

    Args:
        model: L/16, XL/16, or any size with the same shapes.
        source: path of a checkpoint, or its state dict with the names of PixNerd's code, with or without a prefix.
        strict: raise an error unless every tensor except the class table fits. The projector of REPA does not count: PixNerd
            has none, and it keeps its initial weights.

    Returns:
        The report; ``str(report)`` is one line.

    Raises:
        UserError: an unreadable file, or with ``strict`` a missing, unexpected or mismatched tensor.
    """
    tensors = read_checkpoint(Path(source)) if isinstance(source, str | Path) else dict(source)
    converted, unexpected = _translate(tensors, model.size.depth)
    report = LoadReport(unexpected=[name for name in unexpected if name != _CLASS_TABLE])
    own = model.state_dict()
    image_channels = 3 if model.condition_on_image else 0
    for name, wanted in own.items():
        if name.startswith("projector."):
            continue
        if name not in converted:
            report.missing.append(name)
            continue
        value = converted.pop(name).to(wanted.dtype)
        if value.shape != wanted.shape:
            value, was = _widen(name, value, wanted, model.channels, image_channels), value
            if value is None:
                report.mismatched.append(f"{name} {tuple(was.shape)} for {tuple(wanted.shape)}")
                continue
            report.widened.append(name)
        own[name] = value
        report.loaded.append(name)
    report.unexpected += sorted(converted)
    last = {f"decoder.final_layer.linear.{part}" for part in ("weight", "bias")}
    wrong = [line for line in report.mismatched if line.split(" ", 1)[0] not in last or model.channels == 3]
    if strict and (report.missing or report.unexpected or wrong):
        raise UserError(f"PixNerd weights do not fit model.size with {model.size}: {report}")
    model.load_state_dict(own)
    return report


def _translate(tensors: dict[str, Tensor], depth: int) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by our names, and the names that our network lacks."""
    prefix = next(p for p in PREFIXES if any(name.startswith(f"{p}s_embedder.") for name in tensors) or not p)
    result: dict[str, Tensor] = {}
    unexpected = []
    for name, value in tensors.items():
        if not name.startswith(prefix):
            # Skip the other copy of the weights, the class-free conditioner and the frozen encoder of REPA.
            continue
        name = name.removeprefix(prefix)
        field = re.match(r"blocks\.(\d+)\.(?:param_generator1\.(?:0\.)?(weight|bias)|norm\.(weight))$", name)
        if field:
            leaf = f"param_generator1.{field[2]}" if field[2] else "norm.weight"
            result[f"decoder.blocks.{int(field[1]) - depth}.{leaf}"] = value
            continue
        gate = re.match(r"(blocks\.\d+\.mlp)\.w1\.weight$", name)
        if gate and f"{prefix}{gate[1]}.w3.weight" in tensors:
            value = torch.cat([value, tensors[f"{prefix}{gate[1]}.w3.weight"]])
            result[f"{gate[1]}.gate_and_value.weight"] = value
            continue
        if re.match(r"blocks\.\d+\.mlp\.w3\.weight$", name) and f"{prefix}{name.replace('w3', 'w1')}" in tensors:
            continue
        for pattern, ours in _RENAMED:
            renamed, count = re.subn(f"^{pattern}", ours, name)
            if count:
                result[renamed] = value
                break
        else:
            unexpected.append(name)
    return result, unexpected


def _widen(name: str, value: Tensor, wanted: Tensor, channels: int, image_channels: int) -> Tensor | None:
    """Add zero columns to ``value`` for the channels beyond PixNerd's 3; None if the shapes differ in another way."""
    if (
        name not in ("patch_embed.proj.weight", "decoder.x_embedder.embedder.0.weight")
        or wanted.shape[0] != value.shape[0]
    ):
        return None
    inputs = channels + (image_channels if name.startswith("patch") else 0)
    pixels = wanted.shape[1] // inputs if name.startswith("patch") else 1
    added = (inputs - 3) * pixels
    if added <= 0 or value.shape[1] + added != wanted.shape[1]:
        return None
    zeros = value.new_zeros(value.shape[0], added)
    return torch.cat([value[:, : 3 * pixels], zeros, value[:, 3 * pixels :]], dim=1)
