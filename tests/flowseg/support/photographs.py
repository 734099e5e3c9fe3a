"""Photographs with an EXIF orientation, and their label maps."""

import numpy as np
from PIL import Image

#: Labels of a photograph as a viewer shows it, 64 pixels wide: class 1 in the upper left corner.
SHOWN = np.zeros((48, 64), np.uint8)
SHOWN[:16, :24] = 1
STORE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(picture, orientation):
    """The pixels of a file that a viewer shows as ``picture``."""
    return picture.transpose(STORE[orientation]) if orientation in STORE else picture


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def photo(shown):
    return Image.fromarray(np.where(shown[..., None] == 1, [220, 30, 30], [30, 30, 220]).astype(np.uint8))


def write_pair(root, orientation, *, shown=SHOWN, suffix="jpg", labels="upright", own=1):
    """A photograph that a viewer shows as ``shown``, with labels drawn on that or on the stored pixels, in both splits."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        options = {"quality": 95} if suffix == "jpg" else {}
        stored(photo(shown), orientation).save(root / f"images/{split}/a.{suffix}", exif=exif(orientation), **options)
        label = Image.fromarray(shown)
        label = stored(label, orientation if labels == "stored" else own)
        label.save(root / f"labels/{split}/a.png", **({"exif": exif(own)} if own != 1 else {}))
    return root
