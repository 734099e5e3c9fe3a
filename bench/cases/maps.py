"""Label maps of real photographs for the decoding benchmarks, read from ../shared/data and never copied."""

import numpy as np
import pytest
import torch

from ..results import ROOT
from ..settings import DEVICE, SETS, SIZE

#: Raw ids of COCO-Stuff in 8-bit PNGs.
FOLDER = ROOT.parent.parent / "shared" / "data" / "cocostuff" / "annotations" / "val2017"


def photograph_maps(classes):
    """(SETS, SIZE, SIZE) classes of photographs, resized by the nearest pixel; each raw id stands for one random class."""
    files = sorted(FOLDER.glob("*.png"))[:SETS]
    if len(files) < SETS:
        pytest.skip(f"{FOLDER} has no {SETS} label maps of COCO-Stuff")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed; `make bench` installs it")
    maps = [np.asarray(image.open(file).resize((SIZE, SIZE), image.Resampling.NEAREST)) for file in files]
    generator = torch.Generator().manual_seed(0)
    class_of = torch.randint(0, classes, (256,), generator=generator)
    return class_of[torch.from_numpy(np.stack(maps)).long()].to(DEVICE)
