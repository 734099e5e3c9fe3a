"""Save and load a trained network as a folder to share: weights, settings and a model card, as on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml

from flowseg.build import build
from flowseg.checkpoint import load_weights, save_weights
from flowseg.config import config_from_tree, override
from flowseg.data.datasets import resolve_labels
from flowseg.errors import UserError
from flowseg.label_kinds import label_kind
from flowseg.runs.terminal import printable
from flowseg.segment import Segmenter, default_device

# Number of classes to list in the model card.
_LISTED = 255
WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    segmenter: Segmenter, folder: Path | str, *, scores: dict | None = None, license: str | None = None
) -> Path:
    """Write weights (safetensors), settings with class names and colours, and a model card.

    Args:
        segmenter: the network to share.
        folder: output folder; it is created if missing, and files of the same names are replaced.
        scores: content of a file of ``flowseg evaluate --json``, for the card.
        license: licence of the weights, for the card; terms of the training images may apply to the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = segmenter.config.model_copy(deep=True)
    labels = resolve_labels(config.data)
    # These paths mean nothing on another machine.
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
    """Load a network from a folder of :func:`save_pretrained`, or from the Hugging Face hub by ``owner/name``.

    Loading a folder makes no network request. Loading runs no code from the files: weights are safetensors, settings JSON.

    Args:
        name: folder, or name on the hub.
        pairs: settings to replace, such as ``["sample.steps=5"]``.
        revision: revision of the hub repository.
        device: device to compute on; ``None``: the accelerator, or the CPU.

    Raises:
        UserError: no such folder or repository, missing files, or settings of another version.
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
    model, codebook = build(config, len(tree["id2label"]))
    if codebook.centroids.shape != centroids.shape or not torch.allclose(codebook.centroids, centroids, atol=1e-6):
        raise UserError(f"{folder / SETTINGS}: its centroids do not match its codes.* settings; the file was edited")
    load_weights(model, folder / WEIGHTS)
    return Segmenter(model.eval(), codebook, config, device or default_device())


def is_shared(name: str) -> bool:
    """Whether ``name`` is a folder of :func:`save_pretrained`, or has the form ``owner/name`` and is no local path."""
    if Path(name).exists():
        return (Path(name) / SETTINGS).is_file()
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def model_card(segmenter: Segmenter, scores: dict | None = None, license: str | None = None) -> str:
    """Text of the model card: description, use, scores, limits, classes."""
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
    dtype = str(label_kind(len(labels.classes)).dtype).removeprefix("torch.")
    more = f" and {len(labels.classes) - _LISTED} more, in `{SETTINGS}`" if len(labels.classes) > _LISTED else ""
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
labels = segmenter.labels("photo.jpg")  # (H, W) {dtype}
```

## Measured

{measured}

## Limits

The network knows only its classes and assigns one of them to every pixel, whatever the pixel shows. Images that differ from
its training images may be segmented badly without any warning. The margin (`labels(image, with_margin=True)`) is a hint, not
a probability.

## Classes

{", ".join(map(_in_markdown, labels.classes[:_LISTED]))}{more}
"""


def _in_markdown(name: str) -> str:
    """Escape a name so that Markdown and HTML show it unchanged."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$])", r"\\\1", printable(name).replace("\n", " "))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, SETTINGS, CARD]))
    except HFValidationError:
        reason = "a name there is OWNER/NAME"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is private"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and there is no copy in the cache"
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
    raise UserError(f"{name!r}: no such folder, and cannot be loaded from the Hugging Face hub ({reason})")
