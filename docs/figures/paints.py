"""The embedded data set "paints" (synthetic scenes of 48 classes): images, and classes in the colours of the report."""

import matplotlib.pyplot as plt
import numpy as np

from flowseg.data.paints import PaintScenes
from flowseg.data.presets import PAINTS
from flowseg.inference.predict import colorize

from . import style

SCENES = 5


def draw():
    figure, axes = plt.subplots(2, SCENES, figsize=(9, 3.8), layout="constrained")
    scenes = PaintScenes("val", SCENES, 64, 64)
    for column in range(SCENES):
        image, labels = scenes[column]
        found = np.unique(np.array(labels))
        for axis, shown in zip(axes[:, column], (image, colorize(np.array(labels), PAINTS.palette))):
            axis.imshow(shown, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[1, column].set_xlabel("\n".join(PAINTS.classes[k] for k in found), fontsize=6)
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("classes")
    style.save(figure, "paints_scenes")
