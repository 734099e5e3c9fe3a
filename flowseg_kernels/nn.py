"""Modules over the functions: FlowLoss, CentroidDecoder, NeuralFieldDecoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .chunked_field import chunked_field, generate
from .codes import Codebook
from .ops.neural_field.reference import FORMS, NORMALISE
from .runtime.checks import check_choice, check_index, check_positive

__all__ = ["CentroidDecoder", "FlowLoss", "NeuralFieldDecoder"]


class FlowLoss(nn.Module):
    """flow_loss with its settings held: FlowLoss(codebook, correction_weight=1.0)(prediction, source, labels, t).

    Args:
        codebook: a Codebook; it is part of the module, so it moves and is saved with it.
        options: keyword arguments of functional.flow_loss, checked at the first call.
    """

    def __init__(self, codebook: Codebook, **options):
        super().__init__()
        self.codebook = codebook
        self.options = options

    def forward(self, prediction: Tensor, source: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        """The loss; shapes as in functional.flow_loss."""
        return functional.flow_loss(prediction, source, labels, t, self.codebook, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class CentroidDecoder(nn.Module):
    """nearest_centroid with its codebook held: CentroidDecoder(codebook)(x) -> labels."""

    def __init__(self, codebook: Codebook, **options):
        super().__init__()
        self.codebook = codebook
        self.options = options

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Labels (B, H, W), and what the options ask for; as in functional.nearest_centroid."""
        return functional.nearest_centroid(x, self.codebook, **self.options)


class _FieldBlock(nn.Module):
    """One block's parameters under PixNerd's names: the generator of its weights and the gain of its norm."""

    def __init__(self, dim: int, hidden: int, mlp_ratio: int, norm: bool):
        super().__init__()
        self.param_generator1 = nn.Linear(dim, 2 * mlp_ratio * hidden * hidden)
        if norm:
            self.norm = nn.RMSNorm(hidden, eps=1e-6)


class _FieldEmbedder(nn.Module):
    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(in_features, hidden))


class _FieldOutput(nn.Module):
    def __init__(self, hidden: int, channels: int, norm: bool):
        super().__init__()
        if norm:
            self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.linear = nn.Linear(hidden, channels)


class NeuralFieldDecoder(nn.Module):
    """From patch features to pixels: generates the weights of the neural field and applies it (PixNerd, arXiv 2507.23268).

    Args:
        dim: D, width of the patch features.
        channels: C of the image.
        hidden: Hx, width of the field.
        depth: L, number of blocks.
        mlp_ratio: r.
        patch_size: p.
        max_freqs: F; the cosine features are F^2.
        normalise: "both" or "first", the generated weights with columns of unit length.
        form: "residual" or "plain"; the plain form has no norms. As in functional.neural_field.
        patch_chunk: generate the weights of at most about so many patches at a time (whole rows of patches, at least one) and
            again in backward: memory for generated weights is that of one chunk. None (default): of all patches at once.

    Parameter names follow PixNerd's (x_embedder.embedder.0, blocks.I.param_generator1, blocks.I.norm, final_layer.norm,
    final_layer.linear), and `load_pixnerd` takes its state dict. The last layer starts at zero: so does the output.
    """

    def __init__(
        self,
        dim: int,
        channels: int = 3,
        hidden: int = 64,
        depth: int = 2,
        mlp_ratio: int = 2,
        patch_size: int = 16,
        max_freqs: int = 8,
        *,
        normalise: str = "both",
        form: str = "residual",
        patch_chunk: int | None = None,
    ):
        super().__init__()
        check_choice("normalise", normalise, NORMALISE)
        check_choice("form", form, FORMS)
        if patch_chunk is not None:
            check_index("patch_chunk", patch_chunk)
            check_positive("patch_chunk", patch_chunk)
        self.patch_chunk = patch_chunk
        self.patch_size, self.mlp_ratio, self.normalise, self.form = patch_size, mlp_ratio, normalise, form
        norm = form == "residual"
        self.x_embedder = _FieldEmbedder(channels + max_freqs**2, hidden)
        self.blocks = nn.ModuleList(_FieldBlock(dim, hidden, mlp_ratio, norm) for _ in range(depth))
        self.final_layer = _FieldOutput(hidden, channels, norm)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x: Tensor, s: Tensor, *, patch_size: int | None = None) -> Tensor:
        """Pixels (B, C, H, W) from x (B, C, H, W) and patch features s (B, N, D), patches in row-major order.

        Args:
            patch_size: pixels along the side of a patch in x, when it differs from training. A field is a function of the
                position in its patch, from 0 at the first pixel to 1 at the last: at 2 p - 1 every second pixel is where a
                pixel was at p. N stays H W / patch_size^2.

        Differentiable in x, s and the parameters; twice, and in forward mode, at the cost of the plain formula and only without
        patch_chunk.
        """
        residual = self.form == "residual"
        embed, last = self.x_embedder.embedder[0], self.final_layer
        shared = (
            embed.weight,
            embed.bias,
            torch.stack([block.norm.weight for block in self.blocks]) if residual else None,
            last.norm.weight if residual else None,
            last.linear.weight,
            last.linear.bias,
        )
        generators = [(block.param_generator1.weight, block.param_generator1.bias) for block in self.blocks]
        options = {
            "patch_size": self.patch_size if patch_size is None else patch_size,
            "mlp_ratio": self.mlp_ratio,
            "eps": 1e-6,
            "normalise": self.normalise,
            "form": self.form,
        }
        if self.patch_chunk is None:
            return functional.neural_field(x, generate(s, generators), *shared, **options)
        return chunked_field(self.patch_chunk, x, s, shared, generators, options)

    def load_pixnerd(self, state_dict: dict[str, Tensor], *, first_block: int, prefix: str = "") -> None:
        """Load x_embedder, the field blocks and final_layer from a PixNerd state dict, in which every block is `blocks.I`.

        PixNerd keeps the generator of a block as the only layer of a Sequential, `param_generator1.0`; both names are read.

        Args:
            state_dict: of the whole PixNerd model, or of these layers.
            first_block: index in it of the first field block (22 for L/16, 26 for XL/16).
            prefix: of all names in it, such as "ema_denoiser." in a training checkpoint of PixNerd.

        Raises:
            KeyError: naming the missing keys.
            RuntimeError: naming the keys whose shape differs.
        """
        own = {}
        missing = []
        for name in self.state_dict():
            theirs = name
            if name.startswith("blocks."):
                _, index, rest = name.split(".", 2)
                theirs = f"blocks.{first_block + int(index)}.{rest}"
            wrapped = theirs.replace("param_generator1.", "param_generator1.0.")
            found = next((key for key in (prefix + theirs, prefix + wrapped) if key in state_dict), None)
            if found is None:
                missing.append(prefix + wrapped)
            else:
                own[name] = state_dict[found]
        if missing:
            raise KeyError(f"state_dict: wanted the keys {', '.join(missing)}; they are not in it")
        self.load_state_dict(own)
