"""FLOPs of the network: how much work one image is, without a GPU and without memory for the network.

Convention: a multiply-add is two FLOPs, and only matrix products and convolutions count. Everything else, the loss and
the correction included, is a small part of the work. The backward is counted without recomputation, which makes these
*model FLOPs* in the sense of PaLM (arXiv 2204.02311, appendix B): FLOPs per second then compare between implementations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowseg.config import Config
from flowseg.errors import UserError
from flowseg.model.backbone import FlowSegModel
from flowseg.model.sizes import ModelSize, resolve_size


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one image.

    Attributes:
        forward: one evaluation of the network.
        backward: the gradients of its parameters.
        recomputed: what ``model.activation_checkpointing`` and ``model.field_chunk`` compute more than once. It is work,
            but not part of the model FLOPs.
    """

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def training(self) -> int:
        """Model FLOPs of a training step per image: forward and backward."""
        return self.forward + self.backward


def count_flops(config: Config, height: int | None = None, width: int | None = None) -> Flops:
    """Count the FLOPs of the network of ``config`` for one image, without REPA.

    The network is built and run on the meta device, which takes a tenth of a second and no memory.

    Args:
        config: settings of a run.
        height, width: size of the image; ``None``: ``data.height`` and ``data.width``, those of the first stage.

    Raises:
        UserError: an unknown network size, or an image size that is not a multiple of its patch size.
    """
    size = resolve_size(config.model)
    height, width = height or config.data.height, width or config.data.width
    for name, value in (("height", height), ("width", width)):
        if value % size.patch_size:
            raise UserError(f"{name} must be a multiple of the patch size {size.patch_size}, got {value}")
    model = config.model
    image = (config.codes.channels, model.head_features, model.condition_on_image, height, width)
    forward, backward = _count(size, *image)
    recomputes = {
        "activation_checkpointing": model.activation_checkpointing,
        "field_chunk": model.field_chunk,
    }
    repeated = sum(_count(size, *image, **recomputes)) - forward - backward if any(recomputes.values()) else 0
    return Flops(forward, backward, repeated)


@functools.lru_cache(maxsize=64)
def _count(
    size: ModelSize,
    channels: int,
    head_features: int | None,
    condition_on_image: bool,
    height: int,
    width: int,
    **recomputes,
) -> tuple[int, int]:
    """FLOPs of a forward and of a backward."""
    if size.depth > 2:
        # All transformer blocks are alike: two networks of few blocks say what one block adds, in a tenth of the time.
        image = (channels, head_features, condition_on_image, height, width)
        one, two = (_count(dataclasses.replace(size, depth=depth), *image, **recomputes) for depth in (1, 2))
        return tuple(a + (size.depth - 1) * (b - a) for a, b in zip(one, two))
    # The caller may have switched gradients off. Fused attention computes its scores again in the backward, which the counter
    # would count.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        with torch.device("meta"):
            options = {"condition_on_image": condition_on_image, "head_features": head_features}
            model = FlowSegModel(size, channels, **options, **recomputes)
            x, t = torch.empty(1, channels, height, width), torch.empty(1)
            image = torch.empty(1, 3, height, width) if condition_on_image else None
        with _counter() as forward:
            loss = model(x, t, image).sum()
        with _counter() as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def _counter():
    """A counter of FLOPs that sets no hooks on modules: they would make the decoder call its layers one by one."""
    # The import takes 0.3 s, and with torch 2.13 it imports Triton.
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(contextlib.nullcontext):
    """A ``ModuleTracker`` that tracks nothing."""

    parents = frozenset({"Global"})
