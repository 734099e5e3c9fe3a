"""Masks of two runs on CamVid and their correct pixels: python -m docs.figures.camvid CAMVID VANILLA_MASKS FLOWSEG_MASKS

`flowseg predict "CAMVID/images/val/*"` writes the folders of masks. The picture shows no photographs and no labels, because the
data set is for research only.
"""

import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from PIL import Image

from flowseg.data.presets import CAMVID
from flowseg.inference.predict import colorize

from . import style

RIGHT, WRONG, UNKNOWN = (245, 245, 245), (200, 30, 30), (150, 150, 150)


def draw(root, **masks):
    names = sorted(path.stem for path in (root / "labels" / "val").glob("*.png"))
    names = [names[i] for i in np.linspace(0, len(names) - 1, 6).astype(int)[1:-1]]
    figure, axes = plt.subplots(2 * len(masks), len(names), figsize=(9.5, 8), layout="constrained")
    for pair, (arm, folder) in zip(axes.reshape(len(masks), 2, -1), masks.items()):
        for column, name in enumerate(names):
            truth = np.array(Image.open(root / "labels" / "val" / f"{name}.png"))
            found = np.array(Image.open(folder / f"{name}.mask.png"))
            known = truth < len(CAMVID.classes)
            hits = np.where(known[..., None], np.where((truth == found)[..., None], RIGHT, WRONG), UNKNOWN)
            for axis, shown in zip(pair[:, column], (colorize(found, CAMVID.palette), hits.astype(np.uint8))):
                axis.imshow(shown, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            pair[1, column].set_xlabel(f"{100 * (truth == found)[known].mean():.1f} % right", fontsize=8)
        pair[0, 0].set_ylabel(f"{arm}: classes")
        pair[1, 0].set_ylabel("right or wrong")
    for axis, name in zip(axes[0], names):
        axis.set_title(name, fontsize=8)
    classes = [*zip(CAMVID.classes, CAMVID.palette), ("right", RIGHT), ("wrong", WRONG), ("not labelled", UNKNOWN)]
    handles = [Patch(facecolor=np.array(c) / 255, edgecolor="gray", linewidth=0.5, label=name) for name, c in classes]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    style.save(figure, "camvid_masks")


if __name__ == "__main__":
    root, vanilla, flowseg = map(pathlib.Path, sys.argv[1:])
    draw(root, vanilla=vanilla, FlowSeg=flowseg)
