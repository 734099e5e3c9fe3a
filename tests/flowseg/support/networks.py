"""Networks with known outputs, in place of trained ones, and photographs for them."""

import functools

import numpy as np
import torch
from PIL import Image
from torch import nn

from flowseg.codes import build_codebook
from flowseg.segment import Segmenter

from ..tiny import tiny_config


class Oracle(nn.Module):
    """Reads the label from the red channel, ``label = round(12 * (red + 1) / 2)``; wrong where green is high."""

    condition_on_image = True

    def __init__(self, codebook, patch_size=8):
        super().__init__()
        self.codes = codebook
        self.size = type("Size", (), {"patch_size": patch_size})()

    def forward(self, x, t, image):
        labels = (12 * (image[:, 0] + 1) / 2).round().long().clamp(0, 10)
        labels = torch.where(image[:, 1] > 0, (labels + 1) % 11, labels)
        return self.codes.centroids[labels].movedim(-1, 1)


class Waves(nn.Module):
    """Fields that vary with every pixel and its place in the image: any error of an interpolation changes the labels."""

    condition_on_image = True

    def __init__(self, patch_size=8):
        super().__init__()
        self.size = type("Size", (), {"patch_size": patch_size})()

    def forward(self, x, t, image):
        place = torch.arange(image[0, 0].numel(), dtype=torch.float32).reshape(image.shape[-2:])
        waves = torch.stack([torch.sin(place * (0.37 + channel / 10)) for channel in range(x.shape[1])])
        return 0.8 * waves + 0.4 * image.mean(1, keepdim=True)


@functools.cache
def codebook_of(channels):
    # Cached: building the decode grid takes a second.
    return build_codebook(tiny_config(codes={"channels": channels}).codes, 11)


class Pairs(list):
    """Images and their label maps, as data sets give them."""

    names = ()


def make_pairs(sizes, seed=0):
    """Photographs that ``Oracle`` reads wrongly in the upper quarter; labels in squares of 8 pixels, ignored in three columns."""
    rng = np.random.default_rng(seed)
    pairs = Pairs()
    for height, width in sizes:
        labels = rng.integers(0, 8, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.round(labels * (255 / 12))
        pixels[: height // 4, :, 1] = 255
        target = labels.copy()
        target[:, -3:] = 255
        pairs.append((Image.fromarray(pixels), Image.fromarray(target)))
    return pairs


def oracle_segmenter(data=None, **sections):
    config = tiny_config(data={"height": 32, "width": 32, **(data or {})}, **sections)
    codebook = codebook_of(config.codes.channels)
    return Segmenter(Oracle(codebook), codebook, config)
