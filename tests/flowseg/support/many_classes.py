"""A small data set in folders with thousands of classes, in label maps of 16 bits."""

import numpy as np
from PIL import Image


def write_many_classes(root, classes, *, first=1):
    """Write four training and two validation pairs of 40x24 pixels under ``images`` and ``labels``, and ``classes.txt``.

    Label values are ``first`` to ``first + classes - 1``, the last one in every map, and 0 in the first two rows. Half of the
    maps are PNG files, half TIFF files. The colours of an image tell its classes.
    """
    rng = np.random.default_rng(0)
    for split, names in (("train", "abcd"), ("val", "ef")):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for place, name in enumerate(names):
            labels = rng.integers(0, classes, (3, 5)).repeat(8, 0).repeat(8, 1)
            labels[-8:, -8:] = classes - 1
            pixels = np.stack([labels % 11 * 25, labels // 11 % 11 * 25, labels // 121 % 11 * 25], -1)
            values = (labels + first).astype(np.uint16)
            values[:2] = 0
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / f"{name}.png")
            Image.fromarray(values).save(root / "labels" / split / f"{name}.{('png', 'tif')[place % 2]}")
    (root / "classes.txt").write_text("".join(f"thing {k}\n" for k in range(classes)), encoding="utf-8")
    return root


def many_classes_section(root, classes, /, **extra):
    """The data section for :func:`write_many_classes`: value 0 is ignored."""
    section = {
        "name": "folder", "root": str(root), "classes": str(root / "classes.txt"), "values": [f"1-{classes}"], "ignore": [0],
        "height": 16, "width": 24,
    }  # fmt: skip
    return {**section, **extra}
