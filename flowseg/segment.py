"""From images to code fields and label maps with a trained network."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowseg.checkpoint import find_weights, load_weights
from flowseg.codes import build_codebook
from flowseg.config import Config
from flowseg.data.datasets import resolve_labels
from flowseg.data.transforms import model_size, prepare
from flowseg.flow import integrate, make_source
from flowseg.model import FlowSegModel, build_model
from flowseg.model.sizes import check_sizes
from flowseg.views import class_probabilities, mean_over_windows, pad_to, resize_labels, windows
from flowseg_kernels import Codebook, nearest_centroid


class Segmenter:
    """A network, its codes and its settings, ready to segment.

    Args:
        model: put into evaluation mode while it samples.
        codebook: its codes.
        config: sampling and data settings.
        device: where to compute.
    """

    def __init__(self, model: FlowSegModel, codebook: Codebook, config: Config, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.model, self.codebook, self.config = model.to(self.device), codebook.to(self.device), config

    @classmethod
    def from_run(
        cls, run: Path, config: Config, checkpoint: str = "latest", device: torch.device | str | None = None
    ) -> Segmenter:
        """Load a trained run; ``config`` is its own, possibly with other sampling settings."""
        path = find_weights(run, checkpoint, config.sample.weights)
        model = build_model(config)
        check_sizes(config, model.size.patch_size)
        load_weights(model, path)
        codebook = build_codebook(config.codes, len(resolve_labels(config.data).classes))
        return cls(model.eval(), codebook, config, device or default_device())

    @torch.no_grad()
    def sample(self, images: Tensor, *, seed: int = 0, steps: int | None = None, keep_path: bool = False):
        """Run the flow on prepared images ``(B, 3, H, W)`` in [-1, 1], in ``steps`` steps or ``sample.steps`` of the settings.

        Returns:
            The code field ``(B, C, H, W)`` float32 at t = 1, and with ``keep_path`` the states on the way.
        """
        flow, sample = self.config.flow, self.config.sample
        images = images.to(self.device)
        generator = torch.Generator().manual_seed(seed)
        # Noise is the same for every image: what comes out does not depend on what it is batched with.
        count = 1 if flow.source == "noise" else len(images)
        source = make_source(images[:count], self.config.codes.channels, flow.source, generator).expand(
            len(images), -1, -1, -1
        )
        condition = images if self.model.condition_on_image else None
        was_training = self.model.training
        self.model.eval()
        with autocast(self.config.train.mixed_precision, self.device):
            result = integrate(
                lambda x, t: self.model(x, t, condition).float(),
                source,
                steps=steps or sample.steps,
                method=sample.method,
                predicts=flow.predicts,
                t_min=flow.t_min,
                keep_path=keep_path,
            )
        self.model.train(was_training)
        return result

    def prepare_batch(self, images: Sequence[Image.Image], scale: float = 1.0) -> tuple[Tensor, tuple[int, int]]:
        """Equal-sized images as one batch, and the part ``(h, w)`` of it that is image."""
        size = model_size(images[0].size[::-1], self.config.data, self.config.sample.resize, scale)
        return torch.stack([prepare(image, size, self.model.size.patch_size) for image in images]), size

    def native_field(self, images: Sequence[Image.Image]) -> Tensor:
        """Fields whose nearest codes are the labels at native resolution, for equal-sized images.

        With one view of an image ``sample.upsample`` decides how: ``"codes"`` interpolates the code field bilinearly,
        ``"labels"`` repeats its nearest pixel (the same labels as decoding first), ``"probabilities"`` interpolates class
        probabilities ``1/(d_k + eps)``, normalised, and gives the code of the likeliest class. Windows, mirrored images and
        scales are averaged as probabilities: the mean of two codes is the code of neither class.

        Returns:
            ``(B, C, H, W)`` float32.
        """
        sample = self.config.sample
        native = images[0].size[::-1]
        if sample.window == "slide" or sample.flip or list(sample.scales) != [1.0]:
            return torch.stack([self._as_codes(self._averaged(image), native) for image in images])
        pixels, (height, width) = self.prepare_batch(images)
        field = self.sample(pixels)[..., :height, :width]
        if field.shape[-2:] == native:
            return field
        if sample.upsample == "codes":
            return F.interpolate(field, size=native, mode="bilinear", align_corners=False)
        if sample.upsample == "labels":
            return F.interpolate(field, size=native, mode="nearest-exact")
        return torch.stack([self._as_codes(self._probabilities(one[None])[0], native) for one in field])

    def _probabilities(self, field: Tensor) -> Tensor:
        return class_probabilities(field, self.codebook.centroids, self.config.loss.eps or self.codebook.default_eps)

    def _averaged(self, image: Image.Image) -> Tensor:
        """Mean class probabilities ``(K, h, w)`` of all views of one image, at the size of the first scale."""
        sample = self.config.sample
        total: Tensor | None = None
        for scale in sample.scales:
            pixels, (height, width) = self.prepare_batch([image], scale)
            for mirrored in (False, True) if sample.flip else (False,):
                # Mirrored before it is padded, so that the padding is at the same sides.
                seen = pixels[0, :, :height, :width].flip(-1) if mirrored else pixels[0]
                if sample.window == "slide":
                    part = self._slide(seen[:, :height, :width])
                else:
                    seen = pad_to(seen, *pixels.shape[-2:])
                    part = self._probabilities(self.sample(seen[None])[..., :height, :width])[0]
                part = part.flip(-1) if mirrored else part
                if total is None:
                    total = part
                elif part.shape == total.shape:
                    total = total + part
                else:
                    total = total + F.interpolate(part[None], size=total.shape[-2:], mode="bilinear", antialias=True)[0]
        return total / (len(sample.scales) * (1 + sample.flip))

    def _slide(self, pixels: Tensor) -> Tensor:
        """Mean class probabilities ``(K, h, w)`` of windows over ``pixels`` ``(3, h, w)``."""
        data, sample = self.config.data, self.config.sample
        height, width = pixels.shape[-2:]
        window = data.height, data.width
        stride = tuple(max(1, round(size * sample.stride)) for size in window)
        padded = pad_to(pixels, *window)
        places = windows(*padded.shape[-2:], window, stride)

        def parts():
            for first in range(0, len(places), sample.batch_size):
                some = places[first : first + sample.batch_size]
                batch = torch.stack([padded[:, rows, columns] for rows, columns in some])
                yield from zip(some, self._probabilities(self.sample(batch)))

        return mean_over_windows(parts(), *padded.shape[-2:])[:, :height, :width]

    def _as_codes(self, probabilities: Tensor, native: tuple[int, int]) -> Tensor:
        """Codes ``(C, H, W)`` of the likeliest classes at native size."""
        if self.config.sample.upsample == "labels":
            labels = probabilities.argmax(0)[None, None].float()
            labels = F.interpolate(labels, size=native, mode="nearest-exact")[0, 0].long()
        else:
            labels = resize_labels(probabilities, native)
        return self.codebook.centroids[labels].movedim(-1, 0)

    def labels(self, image: Image.Image, *, with_margin: bool = False):
        """Label map ``(H, W)`` uint8 of one image at its own size; with ``with_margin`` also the margin ``(H, W)``
        float32: second smallest distance to a code minus the smallest.
        """
        field = self.native_field([image])
        if with_margin:
            labels, margin = nearest_centroid(field, self.codebook, out_dtype=torch.uint8, return_margin=True)
            return labels[0].cpu(), margin[0].cpu()
        return nearest_centroid(field, self.codebook, out_dtype=torch.uint8)[0].cpu()


def resolve_precision(name: str, device: torch.device) -> str:
    """``"no"`` or ``"bf16"``; ``"auto"`` takes bf16 where the device multiplies it in hardware."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        facts = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if facts.get("avx512_bf16") or facts.get("amx_bf16") else "no"
    return "no"


def autocast(precision: str, device: torch.device):
    """Context in which the network computes: bf16 matrix products, or nothing changed."""
    if resolve_precision(precision, device) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
