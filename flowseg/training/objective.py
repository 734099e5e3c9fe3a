"""The loss of one batch: sample a point on the path of each example, predict there, compare with the labels."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowseg.codes import IGNORE_INDEX
from flowseg.config import Config
from flowseg.devices import to_device
from flowseg.flow import make_source, sample_times
from flowseg.training.alignment import ImageFeatures, alignment_loss
from flowseg_kernels import Codebook, flow_interpolate, flow_loss


@dataclasses.dataclass
class Objective:
    """Losses of a batch, and the tensors that :func:`squared_error` needs.

    Attributes:
        flow: sum over labelled pixels of the flow loss (a mean over channels) or of the cross-entropy. Divide it by the
            number of labelled pixels.
        align: REPA's loss, a mean over patches; ``None`` without an encoder.
        prediction, source, labels, t: inputs of :func:`squared_error`.
    """

    flow: Tensor
    align: Tensor | None
    prediction: Tensor
    source: Tensor
    labels: Tensor
    t: Tensor


def flow_step(
    model: nn.Module,
    codebook: Codebook,
    config: Config,
    images: Tensor,
    labels: Tensor,
    draws: Tensor,
    encoder: ImageFeatures | None = None,
) -> Objective:
    """Compute the loss of one batch.

    Args:
        model: ``(x_t, t, image) -> prediction``.
        codebook: codes on the device of ``images``.
        config: flow, loss and code settings.
        images: ``(B, 3, H, W)`` in [-1, 1].
        labels: ``(B, H, W)``, 255 is ignored.
        draws: ``(B,)`` numbers of the examples in the run. Time and noise depend only on the seed and this number, not on
            how the examples of a step are divided among batches and processes.
        encoder: the encoder that REPA aligns with.
    """
    flow, loss = config.flow, config.loss
    generators = [example_generator(config.train.seed, int(draw)) for draw in draws]
    times = [
        sample_times(
            1,
            sampler=flow.time_sampler,
            mean=flow.time_mean,
            std=flow.time_std,
            shift=flow.time_shift,
            zero_fraction=flow.zero_fraction,
            generator=generator,
        )
        for generator in generators
    ]
    t = to_device(torch.cat(times), images.device)
    sources = [make_source(images[i : i + 1], config.codes.channels, flow.source, g) for i, g in enumerate(generators)]
    source = torch.cat(sources)
    x_t = flow_interpolate(source, labels, t, codebook)
    condition = images if config.model.condition_on_image else None
    align = None
    if encoder is None:
        prediction = model(x_t, t, condition)
    else:
        prediction, projected = model(x_t, t, condition, align_after=config.repa.block)
        patch = round((images[0, 0].numel() / projected.shape[1]) ** 0.5)
        features = encoder(images, images.shape[-2] // patch, images.shape[-1] // patch)
        align = alignment_loss(projected, features)
    # The loss is computed in float32, also under autocast: the correction depends on small distances to codes.
    prediction = prediction.float()
    if loss.kind == "cross_entropy":
        value = F.cross_entropy(prediction, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        return Objective(value, align, prediction.detach(), source, labels, t)
    value = flow_loss(
        prediction,
        source,
        labels,
        t,
        codebook,
        predicts=flow.predicts,
        loss_space=loss.space,
        correction_weight=loss.correction_weight,
        schedule=loss.schedule,
        temperature=loss.temperature,
        eps=loss.eps,
        transform=loss.transform,
        max_norm=loss.max_norm,
        reduction="sum",
    )
    return Objective(value, align, prediction.detach(), source, labels, t)


@torch.no_grad()
def squared_error(step: Objective, codebook: Codebook, config: Config) -> Tensor:
    """Mean squared error of a prediction. Unlike the loss, it can be compared between settings of the correction."""
    return flow_loss(
        step.prediction,
        step.source,
        step.labels,
        step.t,
        codebook,
        predicts=config.flow.predicts,
        loss_space=config.loss.space,
        correction_weight=0.0,
    )


def example_generator(seed: int, draw: int) -> torch.Generator:
    """Make the generator of one example, which depends only on the seed and the example's number in the run."""
    # SeedSequence mixes the numbers: neighbouring examples get unrelated streams.
    words = np.random.SeedSequence((seed, 2, draw)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)
