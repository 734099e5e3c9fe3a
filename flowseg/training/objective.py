"""The loss of one batch: sample a point on the path of each example, predict there, compare with the labels."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowseg.config import Config
from flowseg.data.loader import Batch
from flowseg.data.transforms import normalised
from flowseg.flow import make_source
from flowseg.label_kinds import label_kind
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
    batch: Batch,
    encoder: ImageFeatures | None = None,
) -> Objective:
    """Compute the loss of one batch.

    Args:
        model: ``(x_t, t, image) -> prediction``.
        codebook: codes on the device of ``batch``.
        config: flow, loss and code settings.
        batch: examples on the device.
        encoder: the encoder that REPA aligns with.
    """
    flow, loss = config.flow, config.loss
    images, labels, t = normalised(batch.images), batch.labels, batch.t
    source = make_source(images, config.codes.channels) if batch.noise is None else batch.noise
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
        ignored = label_kind(codebook.num_classes).ignore
        value = F.cross_entropy(prediction, labels.long(), ignore_index=ignored, reduction="sum")
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
