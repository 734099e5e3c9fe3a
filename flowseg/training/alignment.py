"""REPA (Yu et al., arXiv 2410.06940): align the network's features with those of a frozen image encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowseg.errors import UserError

# DINOv2 was trained on pixels normalised with ImageNet's mean and standard deviation, for pixels in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFeatures(nn.Module):
    """Patch features of a frozen DINOv2, one per patch of our network.

    Args:
        encoder: a ``Dinov2Model`` or ``Dinov2WithRegistersModel`` of transformers.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        patch = encoder.config.patch_size
        self.patch_size = patch if isinstance(patch, int) else patch[0]
        self.dim = encoder.config.hidden_size
        self.leading = 1 + getattr(encoder.config, "num_register_tokens", 0)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, name: str) -> ImageFeatures:
        """Load an encoder by its name on the hub or from a folder.

        Raises:
            UserError: transformers is not installed, the encoder cannot be loaded, or it is not a DINOv2.
        """
        try:
            from transformers import AutoModel
        except ModuleNotFoundError:
            raise UserError("repa.weight > 0 needs transformers; install it with: pip install '.[repa]'") from None
        try:
            encoder = AutoModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"repa.encoder {name!r}: cannot be loaded ({reason}); give a hub name or a folder"
            ) from None
        if not encoder.config.model_type.startswith("dinov2"):
            raise UserError(f"repa.encoder {name!r}: wanted a dinov2 model, got {encoder.config.model_type!r}")
        return cls(encoder)

    def train(self, mode: bool = True) -> ImageFeatures:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Features ``(B, rows * columns, dim)`` of images ``(B, 3, H, W)`` in [-1, 1], patches in row-major order.

        The images are resized to ``rows`` by ``columns`` patches of the encoder, which then coincide with ours.
        """
        size = rows * self.patch_size, columns * self.patch_size
        pixels = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels = ((pixels.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        return self.encoder(pixel_values=pixels).last_hidden_state[:, self.leading :]


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Mean over patches of ``1 - cos(projected, features)``. Both are ``(B, N, dim)``; differentiable in ``projected``."""
    return 1 - F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()
