"""Segmenters of random networks, what they must sample, and changes of their weights."""

import torch

from flowseg.build import build
from flowseg.flow import integrate
from flowseg.segment import Segmenter, autocast

from ..tiny import tiny_config


def random_segmenter(device="cpu", **sections):
    """A segmenter whose weights are random; a new network has layers of zeros. Its precision is bf16 if ``train`` is not given."""
    sections.setdefault("train", {"mixed_precision": "bf16"})
    config = tiny_config(**{"sample": {"steps": 3}, **sections})
    model, codebook = build(config, 11)
    with torch.no_grad():
        for index, value in enumerate(model.parameters()):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index)))
    return Segmenter(model.eval().requires_grad_(False), codebook, config, device)


def images(batch=2, height=16, width=24):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def plain_sample(segmenter, pixels):
    """The solver over the network itself, under autocast."""
    config = segmenter.config
    with autocast(config.train.mixed_precision, segmenter.device):
        return integrate(
            lambda x, t: segmenter.model(x, t, pixels).float(),
            pixels,
            steps=config.sample.steps,
            method=config.sample.method,
            predicts=config.flow.predicts,
            t_min=config.flow.t_min,
        )


def loaded(segmenter, assign=False):
    """Load a state in which every number is a tenth larger, into the tensors of the network."""
    segmenter.model.load_state_dict({k: v * 1.1 for k, v in segmenter.model.state_dict().items()}, assign=assign)


def assigned(segmenter):
    """Load such a state, in new tensors."""
    loaded(segmenter, assign=True)


def written(segmenter):
    """Write all weights in place, as an average of weights does."""
    with torch.no_grad():
        torch._foreach_mul_(list(segmenter.model.parameters()), 1.1)
