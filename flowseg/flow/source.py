"""The source ``x0`` of the flow: the image itself, or Gaussian noise."""

from __future__ import annotations

import torch
from torch import Tensor

from flowseg.devices import to_device


def make_source(image: Tensor, channels: int, kind: str = "image", generator: torch.Generator | None = None) -> Tensor:
    """The starting point of the flow in code space.

    The source ``"image"`` is the image followed by channels of zeros, so it is deterministic (arXiv 2603.19218 for 3
    channels; the zeros are our extension). The source ``"noise"`` consists of independent standard normal numbers.

    Args:
        image: ``(B, 3, H, W)``, values in [-1, 1].
        channels: number of code channels ``C``.
        kind: ``"image"`` (needs C >= 3) or ``"noise"``.
        generator: CPU generator of the noise; noise drawn on the CPU is the same for every device.

    Returns:
        ``(B, C, H, W)`` in the dtype and on the device of ``image``.

    Raises:
        ValueError: fewer than 3 channels for an image source, which would drop a colour; or an unknown kind.
    """
    batch, image_channels, height, width = image.shape
    if kind == "noise":
        noise = torch.randn(batch, channels, height, width, generator=generator)
        return to_device(noise, image.device).to(image.dtype)
    if kind != "image":
        raise ValueError(f"kind must be 'image' or 'noise', got {kind!r}")
    if channels < image_channels:
        raise ValueError(f"an image source needs at least {image_channels} code channels, got {channels}")
    if channels == image_channels:
        return image
    padding = image.new_zeros(batch, channels - image_channels, height, width)
    return torch.cat([image, padding], dim=1)
