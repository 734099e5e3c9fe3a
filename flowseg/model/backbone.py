"""The network: a transformer turns patches into features, and generated neural fields turn features into pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowseg.config import Config
from flowseg.model.blocks import Block, TimeEmbedding, rotary_table
from flowseg.model.sizes import ModelSize, resolve_size
from flowseg_kernels import NeuralFieldDecoder


class FlowSegModel(nn.Module):
    """The network that predicts the flow at ``x_t``: a velocity or an end point.

    The architecture is PixNerd's (arXiv 2507.23268); the conditioning on an image is our addition.

    Args:
        size: widths and depths.
        channels: number of code channels C.
        condition_on_image: concatenate the image (3 channels) with ``x_t`` before the patch embedding.
        activation_checkpointing: store only the input of each block for the backward pass and recompute the rest.
        field_chunk: generate the neural-field weights of this many patches at a time; ``None``: of all.
        align_dim: width of the encoder features for REPA; adds the projector to that width.
        head_features: the channels come from a linear layer on this many features per pixel, and the network reads only that
            many channels of ``x_t``; ``None``: they come from the neural field.
    """

    def __init__(
        self,
        size: ModelSize,
        channels: int = 3,
        *,
        condition_on_image: bool = True,
        activation_checkpointing: bool = False,
        field_chunk: int | None = None,
        align_dim: int | None = None,
        head_features: int | None = None,
    ):
        super().__init__()
        self.size = size
        self.channels = channels
        self.condition_on_image = condition_on_image
        self.activation_checkpointing = activation_checkpointing
        self.field_channels = channels if head_features is None else head_features
        inputs = self.field_channels + (3 if condition_on_image else 0)
        self.patch_embed = (ConvStem if size.stem_width else PatchEmbedding)(inputs, size)
        self.time_embed = TimeEmbedding(size.dim)
        self.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.depth))
        self.decoder = NeuralFieldDecoder(
            size.dim,
            channels=self.field_channels,
            hidden=size.field_hidden,
            depth=size.field_depth,
            patch_size=size.patch_size,
            patch_chunk=field_chunk,
        )
        self.head = None if head_features is None else nn.Conv2d(head_features, channels, 1)
        self.projector = None if align_dim is None else Projector(size.dim, align_dim)
        self._tables: dict[tuple, Tensor] = {}

    def forward(
        self, x: Tensor, t: Tensor, image: Tensor | None = None, *, align_after: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict at ``x`` and time ``t``.

        Args:
            x: ``(B, C, H, W)``; H and W are multiples of the patch size. With ``head_features`` further channels are not read.
            t: ``(B,)`` in [0, 1].
            image: ``(B, 3, H, W)`` in [-1, 1]; required if the model is conditioned on the image.
            align_after: also return the projected patch features after this number of blocks.

        Returns:
            ``(B, C, H, W)``, all zeros for a new model without ``head_features``; with ``align_after`` also ``(B, N, align_dim)``.

        Raises:
            ValueError: a size that is not a multiple of the patch size, or a missing image.
        """
        patch, x = self.size.patch_size, x[:, : self.field_channels]
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
        aligned = None
        for number, block in enumerate(self.blocks, 1):
            if self.activation_checkpointing and torch.is_grad_enabled():
                features = checkpoint(block, features, condition, table, use_reentrant=False)
            else:
                features = block(features, condition, table)
            if number == align_after:
                aligned = self.projector(features)
        out = self.decoder(x, F.silu(time[:, None] + features))
        if self.head is not None:
            out = self.head(out)
        return out if align_after is None else (out, aligned)

    def prepare(self, height: int, width: int, device: torch.device) -> None:
        """Make the tables for images of this size.

        Call this before a compiled network sees a size for the first time: a table that is made in the call changes what the
        compiler has assumed, and the second call compiles again.
        """
        self._rotary(height // self.size.patch_size, width // self.size.patch_size, device)

    def _rotary(self, rows: int, columns: int, device: torch.device) -> Tensor:
        key = (rows, columns, device)
        if key not in self._tables:
            self._tables[key] = rotary_table(rows, columns, self.size.dim // self.size.heads).to(device)
        return self._tables[key]


class Projector(nn.Sequential):
    """Project patch features to the width of an encoder by three linear layers (REPA, arXiv 2410.06940)."""

    def __init__(self, dim: int, out: int):
        super().__init__(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, out))


class PatchEmbedding(nn.Module):
    """Turn each patch into a feature by one linear map of its ``inputs * p * p`` numbers (PixNerd)."""

    def __init__(self, inputs: int, size: ModelSize):
        super().__init__()
        self.patch_size = size.patch_size
        self.proj = nn.Linear(inputs * size.patch_size**2, size.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, N, dim)``, patches in row-major order."""
        p = self.patch_size
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.proj(patches.reshape(batch, -1, channels * p * p))


class ConvStem(nn.Module):
    """Turn patches into features by 3x3 convolutions: first with stride 2 down to one pixel per patch, then residual ones.

    Patches that see their neighbours from the start make a small network learn much faster from few images
    (arXiv 2106.14881). PixNerd has no such stem.
    """

    def __init__(self, inputs: int, size: ModelSize):
        super().__init__()
        if size.patch_size & (size.patch_size - 1):
            raise ValueError(f"a convolutional stem needs a patch size that is a power of two, got {size.patch_size}")
        layers: list[nn.Module] = []
        width = size.stem_width
        for _ in range(size.patch_size.bit_length() - 1):
            layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.SiLU()]
            inputs, width = width, min(2 * width, size.dim)
        self.down = nn.Sequential(*layers)
        self.proj = nn.Conv2d(inputs, size.dim, 1)
        self.mix = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, size.dim), nn.SiLU(), nn.Conv2d(size.dim, size.dim, 3, padding=1))
            for _ in range(size.stem_depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, N, dim)``, patches in row-major order."""
        x = self.proj(self.down(x.contiguous(memory_format=torch.channels_last)))
        for layer in self.mix:
            x = x + layer(x)
        return x.flatten(2).transpose(1, 2)


def build_model(config: Config, *, align_dim: int | None = None) -> FlowSegModel:
    """Build the network of a run; its initial weights depend only on ``config.train.seed`` and the model settings.

    The global random state does not change.

    Args:
        config: settings of the run.
        align_dim: width of the encoder features for REPA; adds the projector.
    """
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return FlowSegModel(
            resolve_size(model),
            config.codes.channels,
            condition_on_image=model.condition_on_image,
            activation_checkpointing=model.activation_checkpointing,
            field_chunk=model.field_chunk,
            align_dim=align_dim,
            head_features=model.head_features,
        )
