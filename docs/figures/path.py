"""The path of the flow: a scene at five times, and its pixels in code space."""

import matplotlib.pyplot as plt
import torch

import flowseg_kernels as fk

from . import style

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw():
    image, labels = style.scene()
    codes = fk.kronecker_centroids(len(style.CLASSES))
    generator = torch.Generator().manual_seed(1)
    shown = torch.randperm(labels.numel(), generator=generator)[:700]
    class_colours = style.to_rgb(codes.T[:, :, None])[:, 0]
    figure, rows = plt.subplots(2, 5, figsize=(11, 4.4), height_ratios=(1, 1.3))
    for t, top, bottom in zip(TIMES, *rows):
        x = fk.flow_interpolate(image, labels, torch.tensor([t]), codes)[0]
        top.imshow(style.to_rgb(x), interpolation="nearest")
        top.set_title(f"t = {t:g}")
        top.axis("off")
        points = x.flatten(1)[:, shown]
        bottom.scatter(points[0], points[1], s=4, c=class_colours[labels.flatten()[shown]], linewidths=0)
        bottom.scatter(codes[:, 0], codes[:, 1], marker="s", s=34, c=class_colours, edgecolors="black", linewidths=0.8)
        bottom.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")
    rows[1][0].set(xlabel="channel 0", ylabel="channel 1")
    figure.tight_layout()
    style.save(figure, "method_path")
