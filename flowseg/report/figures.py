"""The figures of the reports, made with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from torch import Tensor

from flowseg.data.presets import Labels
from flowseg.inference.predict import colorize
from flowseg.label_kinds import label_kind
from flowseg.report.names import drawable, font_families
from flowseg_kernels import Codebook, distance_correction, kronecker_centroids

COLORS = {"vanilla": "#b5651d", "FlowSeg": "#1f5fa8", "run": "#1f5fa8"}


def flow_figure(
    image: Tensor,
    truth: np.ndarray,
    paths: dict[str, list[tuple[float, Tensor]]],
    masks: dict[str, np.ndarray],
    labels: Labels,
) -> Figure:
    """One scene: the image and the truth, then the steps of the flow and the decoded mask, one row per arm.

    Args:
        image: ``(3, H, W)`` in [-1, 1].
        truth: labels ``(H, W)``.
        paths: states ``(t, x)`` of each arm, with ``x`` ``(C, H, W)``; the first three channels are shown as colours.
        masks: labels ``(H, W)`` of each arm.
        labels: names and colours of the classes.
    """
    palette = labels.palette
    columns = 2 + max(len(path) for path in paths.values())
    height, width = truth.shape
    figure = Figure(figsize=(1.75 * columns, 1.75 * len(paths) * height / width + 0.8), layout="constrained")
    axes = figure.subplots(len(paths), columns, squeeze=False)
    for row, (name, path) in enumerate(paths.items()):
        left = [("image", _as_picture(image)), ("truth", colorize(truth, palette))]
        panels = [left[row] if row < 2 else ("", None)]
        panels += [(f"t = {t:g}", _as_picture(x)) for t, x in path]
        wrong = (masks[name] != truth) & (truth != label_kind(len(palette)).ignore)
        panels += [("decoded", colorize(masks[name], palette))]
        for column, axis in enumerate(axes[row]):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if column >= len(panels) or panels[column][1] is None:
                continue
            title, picture = panels[column]
            axis.imshow(picture, interpolation="nearest")
            if row == 0 or column == 0:
                axis.set_title(title, fontsize=9, color="#333333")
            if column == 1:
                axis.set_ylabel(name, fontsize=11, color=COLORS.get(name), fontweight="bold")
            if column == len(panels) - 1:
                axis.set_xlabel(f"{100 * (1 - wrong.mean()):.1f} % of pixels right", fontsize=8, color="#555555")
    handles, names = _legend(labels.classes, palette), len(labels.classes)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=names, frameon=False, prop=_font(8), handlelength=1.2
    )
    return figure


def legend_figure(classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> Figure:
    """The colours of the classes in one line."""
    figure = Figure(figsize=(min(1.05 * len(classes), 11), 0.4))
    figure.legend(
        handles=_legend(classes, palette),
        loc="center",
        ncols=len(classes),
        frameon=False,
        prop=_font(8),
        handlelength=1.2,
    )
    return figure


def curve_figure(
    curves: dict[str, list[tuple[int, float]]],
    errors: dict[str, list[tuple[int, float]]],
    title: str = "validation mIoU, the same 50 or fewer images for both",
) -> Figure:
    """Validation mIoU and plain squared error of training batches over steps.

    Args:
        curves: ``(step, mIoU)`` of each arm.
        errors: ``(step, squared error)`` of each arm.
        title: title of the mIoU plot.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        steps, scores = [step for step, _ in points], [miou for _, miou in points]
        left.plot(steps, scores, marker="o", markersize=4, color=COLORS.get(name), label=name, linewidth=2)
        steps, values = (np.array(part, float) for part in zip(*errors[name]))
        right.plot(steps, values, color=COLORS.get(name), alpha=0.18, linewidth=1)
        right.plot(steps, _smooth(values), color=COLORS.get(name), label=name, linewidth=2)
    left.set(xlabel="training steps", ylabel="mIoU, %", title=title)
    right.set(
        xlabel="training steps", ylabel="mean squared error", title="plain squared error on training batches, mean of 7"
    )
    right.set_yscale("log")
    left.set_ylim(bottom=0)
    for axis in (left, right):
        _tidy(axis)
        axis.legend(frameon=False)
    return figure


def iou_figure(
    classes: Sequence[str],
    iou: Sequence[float | None],
    palette: Sequence[tuple[int, int, int]],
    chosen: Sequence[int] | None = None,
) -> Figure:
    """IoU of classes in the colours of the masks.

    Args:
        classes: names.
        iou: IoU of each class, ``None`` for a class that does not occur.
        palette: class colours.
        chosen: the classes to show, in this order; ``None``: each class that occurs, the best first.
    """
    present = sorted((k for k, value in enumerate(iou) if value is not None), key=lambda k: -iou[k])
    present = present if chosen is None else list(chosen)
    figure = Figure(figsize=(9, 0.6 + 0.2 * len(present)), layout="constrained")
    axis = figure.subplots()
    axis.barh(
        range(len(present)), [iou[k] for k in present], color=[np.array(palette[k]) / 255 for k in present],
        edgecolor="#777777", linewidth=0.4,
    )  # fmt: skip
    names = drawable(classes)
    axis.set_yticks(range(len(present)), [names[k] for k in present], fontproperties=_font(8))
    axis.set(xlabel="IoU, %", xlim=(0, 100), ylim=(len(present) - 0.4, -0.6))
    _tidy(axis)
    return figure


def iou_histogram(iou: Sequence[float | None]) -> Figure:
    """Number of classes by IoU, in steps of five percent, for classes that occur."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.hist([value for value in iou if value is not None], bins=20, range=(0, 100), color=COLORS["run"])
    axis.set(xlabel="IoU, %", ylabel="classes", xlim=(0, 100))
    _tidy(axis)
    return figure


def confusion_figure(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Confusion matrix in percent of each true class. Classes that occur in neither truth nor prediction are left out.

    Args:
        confusion: ``(K, K)`` counts ``[truth, prediction]``.
        classes: names.
    """
    present = np.flatnonzero(confusion.sum(1) + confusion.sum(0))
    counts = confusion[np.ix_(present, present)]
    shares = 100 * counts / np.maximum(confusion[present].sum(1, keepdims=True), 1)
    side = min(11.0, 3.5 + 0.25 * len(present))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    # An exponent below one makes mistakes of a few percent visible.
    mesh = axis.imshow(shares, cmap="YlGnBu", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if len(present) <= 60:
        shown = drawable(classes)
        names = [shown[k] for k in present]
        axis.set_xticks(range(len(present)), names, rotation=90, fontproperties=_font(7))
        axis.set_yticks(range(len(present)), names, fontproperties=_font(7))
    axis.set(xlabel="prediction", ylabel="truth")
    figure.colorbar(mesh, label="% of the true class", shrink=0.8)
    return figure


def grid_figure(rows: Sequence[dict], palette: Sequence[tuple[int, int, int]]) -> Figure:
    """One row per image: image, truth, prediction, errors, margin.

    Args:
        rows: ``image`` ``(H, W, 3)`` uint8, ``truth`` and ``labels`` ``(H, W)``, ``margin`` ``(H, W)`` from 0 to 1.
        palette: class colours.
    """
    titles = ("image", "truth", "prediction", "wrong in red", "margin, dark is uncertain")
    tallest = [row["truth"].shape[0] / row["truth"].shape[1] for row in rows]
    figure = Figure(figsize=(12.5, 2.5 * sum(tallest) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=tallest)
    for number, (line, row) in enumerate(zip(axes, rows)):
        labelled = row["truth"] != label_kind(len(palette)).ignore
        wrong = np.repeat((row["image"].mean(-1, keepdims=True) * 0.5 + 110).astype(np.uint8), 3, -1)
        wrong[labelled & (row["labels"] != row["truth"])] = (200, 30, 30)
        wrong[~labelled] = 0
        panels = (row["image"], colorize(row["truth"], palette), colorize(row["labels"], palette), wrong, row["margin"])
        for axis, panel, title in zip(line, panels, titles):
            axis.imshow(panel, interpolation="nearest", cmap="gray", vmin=0, vmax=1 if panel.ndim == 2 else None)
            axis.set_axis_off()
            if number == 0:
                axis.set_title(title, fontsize=9, color="#333333")
        right = 100 * (row["labels"] == row["truth"])[labelled].mean() if labelled.any() else 0.0
        line[2].text(
            0, -0.02, f"{right:.1f} % right", transform=line[2].transAxes, fontsize=7, va="top", color="#555555"
        )
    return figure


def trajectory_figure(
    path: Sequence[tuple[float, Tensor]], truth: np.ndarray, codes: np.ndarray, palette: Sequence[tuple[int, int, int]]
) -> Figure:
    """Paths of some pixels from the image to a code, projected on the plane in which the codes vary most.

    Args:
        path: states ``(t, x)`` with ``x`` ``(C, H, W)``.
        truth: labels ``(H, W)``.
        codes: ``(K, C)``.
        palette: class colours; a path has the colour of its true class.
    """
    centre = codes.mean(0)
    _, _, axes = np.linalg.svd(codes - centre, full_matrices=False)
    plane = axes[:2].T if codes.shape[1] > 1 else np.array([[1.0, 0.0]])
    figure = Figure(figsize=(7.5, 6.2), layout="constrained")
    axis = figure.subplots()
    present = [k for k in np.unique(truth) if k != label_kind(len(palette)).ignore]
    for k in present:
        places = np.argwhere(truth == k)
        # Evenly spread pixels rather than random ones: the picture is reproducible.
        for y, x in places[np.linspace(0, len(places) - 1, min(12, len(places))).astype(int)]:
            points = np.stack([state[:, y, x].cpu().numpy() for _, state in path])
            points = (points - centre) @ plane
            axis.plot(*points.T, color=np.array(palette[k]) / 255, linewidth=0.9, alpha=0.7)
            axis.plot(*points[-1], ".", color=np.array(palette[k]) / 255, markersize=4)
    flat = (codes - centre) @ plane
    axis.scatter(*flat.T, s=14, color="white", edgecolor="#999999", linewidth=0.8, zorder=3)
    axis.scatter(
        *flat[present].T, s=70, marker="*", color=[np.array(palette[k]) / 255 for k in present], edgecolor="#222222",
        linewidth=0.8, zorder=4,
    )  # fmt: skip
    axis.set(xlabel="first axis of the codes", ylabel="second axis", aspect="equal")
    _tidy(axis)
    return figure


def vector_field_figure(num_classes: int = 11, correction_weight: float = 1.0, target: int = 4) -> Figure:
    """Negative gradient of the loss around the code of a class: plain squared error, and with the correction.

    The figure uses two code channels, like figure 1 of the paper. Arrows are minus the gradient of the loss of one pixel,
    ``-2 (x - mu_y + lambda grad Phi)``, computed by the package.
    """
    codebook = Codebook(kronecker_centroids(num_classes, 2))
    codes = codebook.centroids
    axis_values = torch.linspace(-1.3, 1.3, 240)
    grid = torch.stack(torch.meshgrid(axis_values, axis_values, indexing="xy"))
    labels = torch.full((1, 240, 240), target, dtype=torch.uint8)
    correction = distance_correction(grid[None], labels, codebook)[0]
    plain = -2 * (grid - codes[target][:, None, None])
    reshaped = plain - 2 * correction_weight * correction

    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.05))
    norms = [field.norm(dim=0) for field in (plain, reshaped)]
    scale = LogNorm(0.3, max(float(norm.max()) for norm in norms))
    shown = slice(7, None, 15)
    xs, ys = grid[0, shown, shown], grid[1, shown, shown]
    for axis, field, norm, title in zip(
        axes, (plain, reshaped), norms, ("plain squared error", "with the distance-aware correction")
    ):
        mesh = axis.pcolormesh(
            axis_values.numpy(),
            axis_values.numpy(),
            norm.numpy(),
            norm=scale,
            cmap="YlGnBu",
            shading="auto",
            alpha=0.85,
        )
        unit = field[:, shown, shown] / field[:, shown, shown].norm(dim=0).clamp_min(1e-9)
        axis.quiver(xs.numpy(), ys.numpy(), *unit.numpy(), color="#222222", scale=28, width=0.004, pivot="mid")
        axis.scatter(*codes.T.numpy(), s=22, color="white", edgecolor="#b00020", linewidth=1.4, zorder=3)
        axis.scatter(*codes[target].numpy(), s=120, marker="*", color="#ffb000", edgecolor="#7a4f00", zorder=4)
        axis.set(title=title, xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.colorbar(mesh, ax=axes[:2], label="gradient norm", shrink=0.9)

    rival = int(
        torch.cdist(codes[target][None], codes)[0].masked_fill_(torch.arange(num_classes) == target, 9e9).argmin()
    )
    away = codes[rival] - codes[target]
    spacing = float(away.norm())
    along = torch.linspace(0, 1.6, 400)
    line = codes[target][:, None] + away[:, None] * along
    pull = distance_correction(line[None, :, None], torch.full((1, 1, 400), target), codebook)[0, :, 0]
    offset = line - codes[target][:, None]
    distance = (along * spacing).numpy()
    axes[2].plot(distance, 2 * offset.norm(dim=0).numpy(), color=COLORS["vanilla"], linewidth=2, label="plain")
    axes[2].plot(
        distance,
        2 * (offset + correction_weight * pull).norm(dim=0).numpy(),
        color=COLORS["FlowSeg"],
        linewidth=2,
        label="with correction",
    )
    axes[2].axvline(spacing, color="#b00020", linestyle=":", linewidth=1.2)
    axes[2].annotate(
        "nearest wrong code", (spacing, axes[2].get_ylim()[1]), xytext=(4, -10), textcoords="offset points", fontsize=8,
        color="#b00020",
    )  # fmt: skip
    axes[2].set(xlabel="distance to the true code", ylabel="gradient norm")
    axes[2].set_title("on the way to the nearest wrong code")
    _tidy(axes[2])
    axes[2].legend(frameon=False, loc="upper left")
    return figure


def speed_figure(rows: Sequence[dict]) -> Figure:
    """Times of both backends as one pair of bars per operation, labelled with their ratio."""
    figure = Figure(figsize=(9, 0.7 + 0.75 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        axis.barh(place - 0.19, row["eager_ms"], 0.36, color="#c9c9c9", label="eager PyTorch" if place == 0 else None)
        axis.barh(
            place + 0.19, row["ours_ms"], 0.36, color=COLORS["FlowSeg"], label="flowseg_kernels" if place == 0 else None
        )
        axis.annotate(
            f"{row['eager_ms'] / row['ours_ms']:.1f}x", (row["ours_ms"], place + 0.19), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9, color=COLORS["FlowSeg"], fontweight="bold",
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    _tidy(axis)
    axis.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def _legend(classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> list[Patch]:
    return [Patch(color=np.array(color) / 255.0, label=name) for name, color in zip(drawable(classes), palette)]


def _font(size: float) -> FontProperties:
    return FontProperties(family=font_families(), size=size)


def _as_picture(x: Tensor) -> np.ndarray:
    return ((x[:3].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the last seven values, or of fewer at the start."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - 7, 0)
    return (sums[last] - sums[first]) / (last - first)


def _tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
