"""A trained network as a folder that can be shared: weights, settings and a model card, as the Hugging Face hub keeps them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml

from flowseg.checkpoint import load_weights, save_weights
from flowseg.codes import build_codebook
from flowseg.config import config_from_tree, override
from flowseg.data.datasets import resolve_labels
from flowseg.errors import UserError
from flowseg.model import build_model
from flowseg.model.sizes import check_sizes
from flowseg.runs.terminal import printable
from flowseg.segment import Segmenter, default_device

WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    segmenter: Segmenter, folder: Path | str, *, scores: dict | None = None, license: str | None = None
) -> Path:
    """Write weights (safetensors), settings with class names and colours, and a model card.

    Args:
        segmenter: what to share.
        folder: made where it is missing; files of the same names are replaced.
        scores: what ``flowseg evaluate --json`` wrote, for the card.
        license: of the weights, for the card; they may inherit terms from the training images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = segmenter.config.model_copy(deep=True)
    labels = resolve_labels(config.data)
    # Whoever loads the folder has neither the data nor the checkpoint that training began with.
    config.data.root = config.model.pixnerd = None
    tree = {
        "flowseg": config.model_dump(mode="json"),
        "id2label": {str(k): name for k, name in enumerate(labels.classes)},
        "palette": [list(color) for color in labels.palette],
        "centroids": segmenter.codebook.centroids.tolist(),
    }
    (folder / SETTINGS).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    save_weights(folder / WEIGHTS, segmenter.model, format="pt")
    card = model_card(segmenter, scores, license)
    (folder / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
    return folder


def from_pretrained(
    name: Path | str,
    pairs: list[str] | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
) -> Segmenter:
    """A network from a folder of :func:`save_pretrained`, or from the hub by its ``owner/name``.

    A folder never leads to a request. No code is run from what is loaded: weights are safetensors, settings JSON.

    Args:
        name: folder, or name on the hub.
        pairs: settings to replace, e.g. ``["sample.steps=5"]``.
        revision: of the hub repository.
        device: where to compute; ``None``: the accelerator.

    Raises:
        UserError: neither a folder nor a repository, files that are missing, or settings of another version.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), revision)
    try:
        tree = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings, centroids = tree["flowseg"], torch.tensor(tree["centroids"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SETTINGS}: not a folder that flowseg export wrote ({error!r})") from None
    config = (
        override(settings, pairs, origin=str(folder / SETTINGS)) if pairs else config_from_tree(settings, str(folder))
    )
    codebook = build_codebook(config.codes, len(tree["id2label"]))
    if codebook.centroids.shape != centroids.shape or not torch.allclose(codebook.centroids, centroids, atol=1e-6):
        raise UserError(f"{folder / SETTINGS}: its codes are not those that codes.* describes; the file was edited")
    model = build_model(config)
    check_sizes(config, model.size.patch_size)
    load_weights(model, folder / WEIGHTS)
    return Segmenter(model.eval(), codebook, config, device or default_device())


def is_shared(name: str) -> bool:
    """Whether ``name`` is a folder of :func:`save_pretrained`, or ``owner/name`` that is nothing on this disk."""
    if Path(name).exists():
        return (Path(name) / SETTINGS).is_file()
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def model_card(segmenter: Segmenter, scores: dict | None = None, license: str | None = None) -> str:
    """Text of the card: what it is, how to use it, what was measured, what is not known."""
    config = segmenter.config
    labels = resolve_labels(config.data)
    front = {
        "library_name": "flowseg",
        "pipeline_tag": "image-segmentation",
        "tags": ["image-segmentation", "semantic-segmentation", "flow-matching"],
        **({"license": license} if license else {}),
    }
    count = sum(p.numel() for p in segmenter.model.parameters())
    if scores:
        measured = (
            f"{scores['miou']:.2f} % mIoU and {scores['pixel_accuracy']:.2f} % pixel accuracy on {scores['images']} images "
            f"of the {scores.get('split', 'val')} split, with `{json.dumps(scores.get('sample', {}))}`."
        )
    else:
        measured = "Not measured: no scores were given when this card was written."
    loss = "plain flow matching" if config.loss.correction_weight == 0 else "flow matching with the FlowSeg correction"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# FlowSeg {config.model.size}, {config.data.name}

Semantic segmentation by a flow from the image to a colour-coded label map (arXiv 2603.19218). {count / 1e6:.1f} M parameters,
{len(labels.classes)} classes, {config.codes.channels} code channels, trained on {config.data.name} at
{config.data.height} x {config.data.width} with {loss} for {config.train.steps} steps.

## Use

```python
from flowseg.hub import from_pretrained

segmenter = from_pretrained("this folder, or its name on the hub")
labels = segmenter.labels("photo.jpg")  # (H, W) uint8
```

## Measured

{measured}

## Limits

It knows only its classes, and gives one of them to every pixel, whatever is there. Images unlike its training images may be
segmented badly without a sign of it; the margin (`labels(image, with_margin=True)`) is a hint, not a probability.

## Classes

{", ".join(map(_in_markdown, labels.classes))}
"""


def _in_markdown(name: str) -> str:
    """A name that Markdown and the HTML in it show as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$])", r"\\\1", printable(name).replace("\n", " "))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, SETTINGS, CARD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name!r}: no such folder, and not to be had from the hub ({reason})") from None
