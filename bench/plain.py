"""The per-pixel ops in the plain PyTorch that a user would write, for eager timing and for torch.compile."""

import torch


def correction(x, labels, mu, eps):
    """Gradient of the cross-entropy on distances at temperature 1, over a (B, K, H, W) array."""
    diff = [x[:, c, None] - mu[None, :, c, None, None] for c in range(mu.shape[1])]
    d = sum(v.square() for v in diff) + eps
    excess = torch.softmax(-d.log(), dim=1).scatter_add(1, labels[:, None], torch.full_like(d[:, :1], -1.0))
    weight = -2 * excess / d
    return torch.stack([(weight * v).sum(1) for v in diff], dim=1)


def interpolate(source, labels, t, mu):
    """The point of the straight path from the source to the code."""
    time = t[:, None, None, None]
    return (1 - time) * source + time * mu[labels].movedim(-1, 1)


def loss(prediction, source, labels, t, mu, eps):
    """The reshaped flow-matching loss of a velocity prediction."""
    x1 = mu[labels].movedim(-1, 1)
    time = t[:, None, None, None]
    xhat = (1 - time) * (source + prediction.detach()) + time * x1
    target = x1 - source - correction(xhat, labels, mu, eps)
    return (prediction - target).square().mean()


def nearest(x, mu):
    """Labels by torch.cdist and argmin."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    return torch.cdist(rows, mu).argmin(1).view(x.shape[0], *x.shape[2:])


def confusion(x, target, mu):
    """(K, K) counts of pixels by true and decoded class."""
    pairs = target.flatten() * len(mu) + nearest(x, mu).flatten()
    return torch.bincount(pairs, minlength=len(mu) ** 2).view(len(mu), len(mu))
