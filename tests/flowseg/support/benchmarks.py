"""Tiny copies of the public benchmarks, in their folder layouts."""

import numpy as np
from PIL import Image

from flowseg.data.presets import voc_palette


def write(root, image, label, values, palette=None):
    for path in (root / image, root / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    values = np.array(values, np.uint8)
    picture = Image.fromarray(values)
    if palette:
        picture = picture.convert("P")
        picture.putpalette([v for color in palette for v in color])
    picture.save(root / label)
    Image.new("RGB", values.shape[::-1], (10, 200, 30)).save(root / image)


def ade20k(root, values):
    for split in ("training", "validation"):
        write(root, f"images/{split}/a.jpg", f"annotations/{split}/a.png", values)


def cocostuff(root, values):
    for split in ("train2017", "val2017"):
        write(root, f"images/{split}/000001.jpg", f"annotations/{split}/000001.png", values)


def cityscapes(root, values):
    for split in ("train", "val"):
        stem = "ulm/ulm_000000_000019"
        write(root, f"leftImg8bit/{split}/{stem}_leftImg8bit.png", f"gtFine/{split}/{stem}_gtFine_labelIds.png", values)


def voc(root, values):
    write(root, "JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png", values, voc_palette(256))
    (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("2007_1\n")


#: Data set to a function that writes it, label values, the class indices that these become, and the number of classes.
CASES = {
    "ade20k": (ade20k, [[0, 1], [150, 2]], [[255, 0], [149, 1]], 150),
    "cocostuff": (cocostuff, [[0, 10, 12], [181, 255, 91]], [[0, 10, 11], [170, 255, 80]], 171),
    "cityscapes": (cityscapes, [[7, 33, 0], [11, 26, 8]], [[0, 18, 255], [2, 13, 1]], 19),
    "voc": (voc, [[0, 20], [255, 15]], [[0, 20], [255, 15]], 21),
}
