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
from flowseg.data.transforms import prepare
from flowseg.flow import integrate, make_source
from flowseg.model import FlowSegModel, build_model
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
        load_weights(model, path)
        codebook = build_codebook(config.codes, len(resolve_labels(config.data).classes))
        return cls(model.eval(), codebook, config, device or default_device())

    @torch.no_grad()
    def sample(self, images: Tensor, *, seed: int = 0, keep_path: bool = False):
        """Run the flow on prepared images ``(B, 3, H, W)`` in [-1, 1].

        Returns:
            The code field ``(B, C, H, W)`` float32 at t = 1, and with ``keep_path`` the states on the way.
        """
        flow, sample = self.config.flow, self.config.sample
        images = images.to(self.device)
        generator = torch.Generator().manual_seed(seed)
        source = make_source(images, self.config.codes.channels, flow.source, generator)
        condition = images if self.model.condition_on_image else None
        was_training = self.model.training
        self.model.eval()
        with autocast(self.config.train.mixed_precision, self.device):
            result = integrate(
                lambda x, t: self.model(x, t, condition).float(),
                source,
                steps=sample.steps,
                method=sample.method,
                predicts=flow.predicts,
                t_min=flow.t_min,
                keep_path=keep_path,
            )
        self.model.train(was_training)
        return result

    def prepare_batch(self, images: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int]]:
        """Equal-sized images as one batch, and the part ``(h, w)`` of it that is image."""
        prepared = [prepare(image, self.config.data, self.model.size.patch_size) for image in images]
        return torch.stack([pixels for pixels, _ in prepared]), prepared[0][1]

    def native_field(self, images: Sequence[Image.Image]) -> Tensor:
        """Fields whose nearest codes are the labels at native resolution, for equal-sized images.

        ``sample.upsample`` decides how: ``"codes"`` interpolates the code field bilinearly, ``"labels"`` repeats its
        nearest pixel (the same labels as decoding first), ``"probabilities"`` interpolates class probabilities
        ``1/(d_k + eps)``, normalised, and gives the code of the likeliest class.

        Returns:
            ``(B, C, H, W)`` float32.
        """
        pixels, (height, width) = self.prepare_batch(images)
        native = images[0].size[::-1]
        field = self.sample(pixels)[..., :height, :width]
        if field.shape[-2:] == native:
            return field
        mode = self.config.sample.upsample
        if mode == "codes":
            return F.interpolate(field, size=native, mode="bilinear", align_corners=False)
        if mode == "labels":
            return F.interpolate(field, size=native, mode="nearest-exact")
        # One image at a time: K maps at native size are the largest arrays of the whole program.
        return torch.cat([self._by_probability(one[None], native) for one in field])

    def _by_probability(self, field: Tensor, native: tuple[int, int]) -> Tensor:
        centroids = self.codebook.centroids
        eps = self.config.loss.eps or 0.2 * self.codebook.min_distance**2
        distance = (field[:, None] - centroids[None, :, :, None, None]).square().sum(2)
        weight = 1 / (distance + eps)
        weight = weight / weight.sum(1, keepdim=True)
        labels = F.interpolate(weight, size=native, mode="bilinear", align_corners=False).argmax(1)
        return centroids[labels].movedim(-1, 1)

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
