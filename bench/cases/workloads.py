"""Workloads of the per-pixel ops: rotating inputs of one number of classes and one distance to the codes."""

import itertools

import torch

import flowseg_kernels as fk

from ..settings import BATCH, DEVICE, SETS, SIZE
from .maps import photograph_maps

#: name: (classes, factor on the standard deviation of points around their codes)
WORKLOADS = {"ade512": (150, 1.0), "coco512": (171, 1.0), "many": (1000, 0.5)}
#: On a CPU every pixel has a random class. On a GPU the main workloads have squares of this side with one class each, as real maps
#: have regions; a random class per pixel is the worst case and a workload of its own.
SQUARE = 32
#: Classes and label maps of the decoding in 8 and 16 channels. "photographs" are label maps of COCO-Stuff.
CHANNELS_CLASSES, CHANNELS_MAPS = (150, 1000, 20_000), ("squares", "random", "photographs")
#: Workloads of this device; on a GPU including the random label map.
NAMES = (*WORKLOADS, "ade512 random") if DEVICE == "cuda" else tuple(WORKLOADS)


def label_map(classes, batch, size, square, generator):
    """(B, size, size) random classes, constant in squares of `square` pixels if given."""
    square = min(square or 1, size)
    few = torch.randint(0, classes, (batch, *[-(-size // square)] * 2), generator=generator, device=DEVICE)
    return few.repeat_interleave(square, 1).repeat_interleave(square, 2)[:, :size, :size].contiguous()


def label_type(classes):
    """The smallest dtype of labels, with a value left for ignored pixels."""
    return torch.uint8 if classes <= 255 else torch.int16 if classes <= 32767 else torch.int32


class Workload:
    """Rotating inputs of one workload: x near its codes, source, labels, times.

    square: side of the squares of one class; by default every pixel has a random class
    maps:   (SETS, size, size) classes to use instead, for a batch of one image
    """

    def __init__(
        self, name, classes, spread, *, channels=3, size=SIZE, batch=BATCH, spread_factor=1.0, square=None, maps=None
    ):
        # Results report `spread`, so it must be the standard deviation that the points really have.
        self.name, self.spread, self.pixels = name, spread * spread_factor, batch * size * size
        self.classes, self.channels = classes, channels
        generator = torch.Generator(DEVICE).manual_seed(0)
        ignore = 255 if classes <= 255 else -1
        self.codebook = fk.Codebook(fk.kronecker_centroids(classes, channels), ignore_index=ignore).to(DEVICE)
        dtype = label_type(classes)
        self.label_dtype, self.sets = dtype, []
        shape = batch, channels, size, size
        for number in range(SETS):
            classes_of = (
                label_map(classes, batch, size, square, generator) if maps is None else maps[number : number + 1]
            )
            noise = torch.randn(shape, generator=generator, device=DEVICE)
            source = torch.rand(shape, generator=generator, device=DEVICE) * 2 - 1
            inputs = {
                "x": self.codebook.encode(classes_of) + self.spread * noise,
                "source": source,
                "labels": classes_of.to(dtype),
                "t": torch.rand(batch, generator=generator, device=DEVICE),
            }
            self.sets.append(inputs)

    def rotate(self):
        return itertools.cycle(self.sets)


def named_workload(name, spread):
    """The workload of one of NAMES."""
    classes, factor = WORKLOADS[name.removesuffix(" random")]
    square = SQUARE if DEVICE == "cuda" and not name.endswith(" random") else None
    return Workload(name, classes, spread, spread_factor=factor, square=square)


def channels_workload(channels, classes, kind, spread=0.05):
    """The workload of decoding in `channels` channels; `kind` is one of CHANNELS_MAPS."""
    square = SQUARE if kind == "squares" else None
    maps = photograph_maps(classes) if kind == "photographs" else None
    name = f"C={channels} K={classes} {kind}"
    return Workload(name, classes, spread, channels=channels, batch=1, square=square, maps=maps)


def with_converted_inputs(work):
    """Add "long" (int64 labels, which plain PyTorch needs) and "bf16" (x) to each input set."""
    for inputs in work.sets:
        inputs.setdefault("long", inputs["labels"].long())
        inputs.setdefault("bf16", inputs["x"].bfloat16())
    return work
