"""Training curves of a small network on random features: squared error alone, with the correction, and a softmax head."""

import matplotlib.pyplot as plt
import torch

import flowseg_kernels as fk

from . import style

CLASSES, FEATURES, BATCH, STEPS, EVERY, SEEDS = 48, 16, 1024, 1200, 40, 5
ARMS = {
    "softmax head": None,
    r"with the correction, $\lambda = 1$": 1.0,
    r"squared error alone, $\lambda = 0$": 0.0,
}


def network(outputs):
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 64),
        torch.nn.SiLU(),
        torch.nn.Linear(64, 64),
        torch.nn.SiLU(),
        torch.nn.Linear(64, outputs),
    )


def run(weight, seed, book):
    """Accuracy in percent on held-out samples, every EVERY steps."""
    torch.manual_seed(seed)
    means = torch.randn(CLASSES, FEATURES)
    model = network(CLASSES if weight is None else book.channels)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)

    def samples(count):
        labels = torch.randint(CLASSES, (1, 1, count))
        return means[labels[0, 0]] + 1.1 * torch.randn(count, FEATURES), labels

    held_out, truth = samples(8192)
    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                out = model(held_out)
            found = out.argmax(dim=1) if weight is None else book.decode(out.T[None, :, None])[0, 0]
            curve.append(100 * float((found == truth[0, 0]).double().mean()))
        x, labels = samples(BATCH)
        out = model(x)
        if weight is None:
            loss = torch.nn.functional.cross_entropy(out, labels[0, 0])
        else:
            image = out.T[None, :, None]
            loss = fk.flow_loss(
                image,
                torch.zeros_like(image),
                labels,
                torch.zeros(1),
                book,
                predicts="endpoint",
                correction_weight=weight,
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return torch.tensor(curve)


def draw():
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), sharey=True, layout="constrained")
    steps = torch.arange(0, STEPS + 1, EVERY)
    for axis, channels in zip(axes, (3, 8)):
        book = fk.Codebook(fk.kronecker_centroids(CLASSES, channels))
        for colour, (name, weight) in zip(("grey", "tab:blue", "tab:orange"), ARMS.items()):
            curves = torch.stack([run(weight, seed, book) for seed in range(SEEDS)])
            axis.plot(steps, curves.median(dim=0).values, color=colour, label=name)
            axis.fill_between(steps, curves.amin(dim=0), curves.amax(dim=0), color=colour, alpha=0.2, linewidth=0)
            print(f"C = {channels}, {name}: {curves[:, -1].tolist()}")
        axis.set(title=f"C = {channels} code channels", xlabel="steps", ylim=(0, None))
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(loc="lower right")
    style.save(figure, "method_convergence")
