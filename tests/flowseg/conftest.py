"""Small data and settings shared by the tests of the stack."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from flowseg.config import Config, config_from_tree

torch.set_num_threads(1)

TINY_MODEL = {"size": "nano", "dim": 32, "heads": 2, "depth": 2, "field_hidden": 8, "stem_width": 0}


def tiny_config(**sections) -> Config:
    """A network of a few thousand parameters on 16x16 scenes, in float32."""
    tree = {
        "model": dict(TINY_MODEL),
        "data": {"height": 16, "width": 16, "digits_train": 12, "digits_val": 6},
        "train": {"batch_size": 4, "steps": 6, "log_every": 1, "eval_every": 3, "mixed_precision": "no"},
        "optim": {"warmup": 2},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_tree(tree)


@pytest.fixture
def folder_data(tmp_path):
    """Six 40x24 pairs with classes 0..2 and some 255, under ``images`` and ``labels``."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for split, names in (("train", "abcd"), ("val", "ef")):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for name in names:
            labels = rng.integers(0, 3, (3, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = np.stack([labels * 80, 255 - labels * 80, labels * 40], -1)
            labels[:2] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(labels).save(root / "labels" / split / f"{name}.png")
    return root


def folder_section(root, **extra) -> dict:
    """The data section for :func:`folder_data`."""
    return {"name": "folder", "root": str(root), "classes": ["a", "b", "c"], "height": 16, "width": 24, **extra}
