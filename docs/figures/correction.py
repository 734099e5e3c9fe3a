"""The correction around codes in the plane: for a point of one class, and for a point of one of two classes."""

import matplotlib.pyplot as plt
import torch

import flowseg_kernels as fk

from . import style

CODES = torch.tensor([[-0.75, -0.55], [0.75, -0.45], [0.0, -0.38], [-0.6, 0.6], [0.55, 0.7], [0.05, 0.2]])


def plane(size):
    """Points of the square [-1.1, 1.1]^2 as an image (1, 2, size, size)."""
    line = torch.linspace(-1.1, 1.1, size)
    v, u = torch.meshgrid(line, line, indexing="ij")
    return torch.stack((u, v))[None]


def codes_on(axis, codes):
    for k, (u, v) in enumerate(codes.tolist()):
        axis.scatter(u, v, s=90, color=style.colours(len(codes))[k], edgecolors="black", zorder=3)
        axis.annotate("ABCDEF"[k], (u, v), ha="center", va="center", fontsize=7, color="white", weight="bold", zorder=4)
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")


def field(axis, book, label, eps):
    """Draw arrows along -grad Phi of a class on top of |grad Phi|."""
    fine = plane(260)
    same = torch.full((1, 260, 260), label)
    size = fk.distance_correction(fine, same, book, eps=eps).square().sum(dim=1).sqrt()[0]
    shown = axis.imshow(size.log10(), extent=(-1.1, 1.1, -1.1, 1.1), origin="lower", cmap="Greys", vmin=-1, vmax=1.3)
    coarse = plane(23)
    step = -fk.distance_correction(coarse, torch.full((1, 23, 23), label), book, eps=eps)[0]
    step = step / step.square().sum(dim=0).sqrt().clamp_min(1e-9)
    axis.quiver(*coarse[0], *step, scale=30, width=0.004, color="tab:blue")
    codes_on(axis, book.centroids)
    return shown


def descend(book, probability, weight, start, steps=900, rate=0.03):
    """The path of a free end-point estimate under the expected flow_loss when the class is A or B at random."""
    x = start.clone().view(1, 2, 1, 1).requires_grad_()
    path = [start]
    source, t = torch.zeros(1, 2, 1, 1), torch.zeros(1)
    for _ in range(steps):
        loss = sum(
            p
            * fk.flow_loss(x, source, torch.full((1, 1, 1), k), t, book, predicts="endpoint", correction_weight=weight)
            for k, p in enumerate(probability)
        )
        (grad,) = torch.autograd.grad(loss, x)
        x = (x - rate * grad).detach().requires_grad_()
        path.append(x.detach().flatten())
    return torch.stack(path)


def draw():
    book = fk.Codebook(CODES)
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.1), layout="constrained")
    for axis, eps in zip(axes, (book.default_eps, 0.1 * book.default_eps)):
        shown = field(axis, book, 0, eps)
        axis.set_title(rf"true class A, $\epsilon$ = {eps:.3f}")
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, ticks=(-1, 0, 1))
    bar.ax.set_yticklabels(("0.1", "1", "10"))
    bar.set_label(r"$|\nabla\Phi|$")
    style.save(figure, "method_correction")

    figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.1), layout="constrained")
    cells = fk.nearest_centroid(plane(400), book)[0]
    start = torch.tensor([0.1, 0.9])
    for axis, weight in zip(axes, (0.0, 1.0)):
        axis.imshow(style.colours(len(CODES))[cells], extent=(-1.1, 1.1, -1.1, 1.1), origin="lower", alpha=0.3)
        codes_on(axis, CODES)
        for x, (name, probability) in enumerate({"A": (1.0, 0.0), "0.6 A, 0.4 B": (0.6, 0.4)}.items()):
            path = descend(book, probability, weight, start)
            axis.plot(*path.T, color=("black", "tab:red")[x], linewidth=1.6, label=f"class {name}")
            axis.scatter(*path[-1], marker="x", s=45, color=("black", "tab:red")[x], zorder=5)
        axis.set_title("squared error alone" if not weight else "with the correction")
    axes[0].legend(loc="upper left", fontsize=8)
    style.save(figure, "method_resting_points")
