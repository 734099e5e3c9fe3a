"""The network: patches to features by a transformer, features to pixels by generated neural fields."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowseg.config import Config
from flowseg.model.blocks import Block, TimeEmbedding, rotary_table
from flowseg.model.sizes import ModelSize, resolve_size
from flowseg_kernels import NeuralFieldDecoder


class FlowSegModel(nn.Module):
    """Prediction (velocity or end point) of the flow at ``x_t`` (PixNerd, arXiv 2507.23268; conditioning ours).

    Args:
        size: widths and depths.
        channels: code channels C.
        condition_on_image: concatenate the image (3 channels) to ``x_t`` at the patch embedding.
    """

    def __init__(self, size: ModelSize, channels: int = 3, *, condition_on_image: bool = True):
        super().__init__()
        self.size = size
        self.channels = channels
        self.condition_on_image = condition_on_image
        inputs = channels + (3 if condition_on_image else 0)
        self.patch_embed = PatchEmbedding(inputs, size)
        self.time_embed = TimeEmbedding(size.dim)
        self.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.depth))
        self.decoder = NeuralFieldDecoder(
            size.dim,
            channels=channels,
            hidden=size.field_hidden,
            depth=size.field_depth,
            patch_size=size.patch_size,
        )
        self._tables: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, image: Tensor | None = None) -> Tensor:
        """Predict at ``x`` and time ``t``.

        Args:
            x: ``(B, C, H, W)``; H and W multiples of the patch size.
            t: ``(B,)`` in [0, 1].
            image: ``(B, 3, H, W)`` in [-1, 1]; needed when the model is conditioned on it.

        Returns:
            ``(B, C, H, W)``, zeros from a new model.

        Raises:
            ValueError: a size that the patch does not divide, or a missing image.
        """
        patch = self.size.patch_size
        height, width = x.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"x must have height and width divisible by the patch size {patch}, got {height}x{width}")
        if self.condition_on_image:
            if image is None:
                raise ValueError("image must be given: the model was built with condition_on_image=True")
            features = self.patch_embed(torch.cat([x, image], dim=1))
        else:
            features = self.patch_embed(x)
        time = self.time_embed(t)
        condition = F.silu(time)
        table = self._rotary(height // patch, width // patch, x.device)
        for block in self.blocks:
            features = block(features, condition, table)
        return self.decoder(x, F.silu(time[:, None] + features))

    def _rotary(self, rows: int, columns: int, device: torch.device) -> Tensor:
        key = (rows, columns, device)
        if key not in self._tables:
            self._tables[key] = rotary_table(rows, columns, self.size.dim // self.size.heads).to(device)
        return self._tables[key]


class PatchEmbedding(nn.Module):
    """Pixels of each patch to a feature, in row-major patch order.

    Without a stem this is one linear map of the ``inputs * p * p`` numbers of a patch (PixNerd). With
    ``stem_width`` > 0 two 3x3 convolutions of stride 2 come first and the linear map reads their ``p/4 x p/4`` outputs:
    the overlap between patches helps a small network trained on few images (arXiv 2106.14881).
    """

    def __init__(self, inputs: int, size: ModelSize):
        super().__init__()
        self.patch_size = size.patch_size
        self.stem = None
        if size.stem_width:
            if size.patch_size % 4:
                raise ValueError(f"a convolutional stem needs a patch size divisible by 4, got {size.patch_size}")
            width = size.stem_width
            self.stem = nn.Sequential(
                nn.Conv2d(inputs, width, 3, stride=2, padding=1),
                nn.GroupNorm(4 if width % 4 == 0 else 1, width),
                nn.SiLU(),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.GroupNorm(4 if width % 2 == 0 else 1, 2 * width),
                nn.SiLU(),
            )
            self.patch_size //= 4
            inputs = 2 * width
        self.proj = nn.Linear(inputs * self.patch_size**2, size.dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, N, dim)``."""
        if self.stem is not None:
            x = self.stem(x)
        p = self.patch_size
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.proj(patches.reshape(batch, -1, channels * p * p))


def build_model(config: Config) -> FlowSegModel:
    """The network of a run, with initial weights that depend on ``config.train.seed`` and the model settings alone.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return FlowSegModel(
            resolve_size(config.model), config.codes.channels, condition_on_image=config.model.condition_on_image
        )
