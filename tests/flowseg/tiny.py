"""Small settings that the tests of the stack share."""

from __future__ import annotations

from flowseg.config import Config, config_from_tree

TINY_MODEL = {"size": "nano", "patch_size": 8, "dim": 32, "heads": 2, "depth": 2, "field_hidden": 8, "stem_width": 0}


def tiny_config(**sections) -> Config:
    """Settings of a network with a few thousand parameters on 16x16 scenes, in float32."""
    tree = {
        "model": dict(TINY_MODEL),
        "codes": {"channels": 3, "sequence": "sqrt_primes"},
        "data": {"height": 16, "width": 16, "scenes_train": 12, "scenes_val": 6},
        "train": {"batch_size": 4, "steps": 6, "log_every": 1, "eval_every": 3, "mixed_precision": "no"},
        "optim": {"warmup": 2},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_tree(tree)


def folder_section(root, **extra) -> dict:
    """The data section for the fixture ``folder_data``."""
    return {"name": "folder", "root": str(root), "classes": ["a", "b", "c"], "height": 16, "width": 24, **extra}
