"""Modules over the functions: FlowLoss, CentroidDecoder, NeuralFieldDecoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import functional
from .bare_layers import any_global_hook, bare_linear, bare_norm, is_bare_linear, is_bare_norm, is_exactly, is_silent
from .codebook import Codebook
from .ops.neural_field.chunked import autocast_dtype, chunked_calls, chunked_field
from .ops.neural_field.reference import (
    FORMS,
    NORMALISE,
    cosine_features,
    from_patches,
    generated_layers,
    split_generated,
    to_patches,
)
from .runtime.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_image,
    check_index,
    check_label_dtype,
    check_numbers,
    check_positive,
    check_tensor,
    compute_dtype,
)
from .runtime.transforms import in_transform

__all__ = ["CentroidDecoder", "FlowLoss", "NeuralFieldDecoder"]


class FlowLoss(nn.Module):
    """flow_loss with a codebook and settings: FlowLoss(codebook, correction_weight=1.0)(prediction, source, labels, t).

    Args:
        codebook: a Codebook. It is a part of the module, so it moves and is saved with the module.
        predicts, loss_space, correction_weight, schedule, temperature, eps, transform, max_norm, ignore_index, reduction, t_min:
            as in functional.flow_loss. Choices and numbers are checked here, the values of tensors at each call.

    Attributes:
        options: the keyword arguments of functional.flow_loss that are not its defaults.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        codebook: Codebook,
        *,
        predicts: str = "velocity",
        loss_space: str | None = None,
        correction_weight: float | Tensor = 1.0,
        schedule: str = "static",
        temperature: float | Tensor = 1.0,
        eps: float | Tensor | None = None,
        transform: str = "neg_log",
        max_norm: float | Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        t_min: float | Tensor = 0.05,
    ):
        super().__init__()
        self.codebook = codebook
        choices = {
            "predicts": predicts,
            "loss_space": loss_space,
            "schedule": schedule,
            "transform": transform,
            "reduction": reduction,
        }
        numbers = {
            "correction_weight": correction_weight,
            "temperature": temperature,
            "eps": eps,
            "max_norm": max_norm,
            "t_min": t_min,
        }
        # Convert NumPy's numbers, which compiled code does not take.
        numbers = {k: v.item() if type(v).__module__ == "numpy" and not v.ndim else v for k, v in numbers.items()}
        functional.check_loss_choices(**choices)
        check_numbers(**numbers)
        if ignore_index is not None:
            ignore_index = check_index("ignore_index", ignore_index)
        self.options = _not_default(FlowLoss.__init__, {**choices, **numbers, "ignore_index": ignore_index})

    def forward(self, prediction: Tensor, source: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        """The loss; shapes as in functional.flow_loss."""
        return functional.flow_loss(prediction, source, labels, t, self.codebook, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class CentroidDecoder(nn.Module):
    """nearest_centroid with a codebook and settings: CentroidDecoder(codebook)(x) -> labels.

    Args:
        codebook: a Codebook. It is a part of the module, so it moves and is saved with the module.
        out_dtype, return_distance, return_margin, ignore_index: as in functional.nearest_centroid.

    Attributes:
        options: the keyword arguments of functional.nearest_centroid that are not its defaults.

    Raises:
        TypeError: naming the argument.
    """

    def __init__(
        self,
        codebook: Codebook,
        *,
        out_dtype: torch.dtype = torch.int64,
        return_distance: bool = False,
        return_margin: bool = False,
        ignore_index: int | None = None,
    ):
        super().__init__()
        self.codebook = codebook
        check_label_dtype("out_dtype", out_dtype)
        if ignore_index is not None:
            ignore_index = check_index("ignore_index", ignore_index)
        given = {
            "out_dtype": out_dtype,
            "return_distance": return_distance,
            "return_margin": return_margin,
            "ignore_index": ignore_index,
        }
        self.options = _not_default(CentroidDecoder.__init__, given)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Labels (B, H, W), or a tuple with distance or margin if asked for; as in functional.nearest_centroid."""
        return functional.nearest_centroid(x, self.codebook, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


def _not_default(function: Callable, given: dict) -> dict:
    """The keyword arguments that differ from the defaults of `function`. A tensor always differs."""
    defaults = function.__kwdefaults__
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, Tensor) or type(value) is not type(defaults[name]) or value != defaults[name]
    }


#: eps of every RMSNorm of the field.
_EPS = 1e-6


class _FieldBlock(nn.Module):
    """The generator of one block's weights and the block's norm, under PixNerd's names."""

    def __init__(self, dim: int, hidden: int, mlp_ratio: int, norm: bool):
        super().__init__()
        self.param_generator1 = nn.Linear(dim, 2 * mlp_ratio * hidden * hidden)
        if norm:
            self.norm = nn.RMSNorm(hidden, eps=_EPS)

    def forward(self, s: Tensor, h: Tensor | None = None, both: bool = True) -> tuple[Tensor, Tensor | None] | Tensor:
        """The block's inputs of the fused op, or with `h` the block itself.

        Args:
            s: patch features (B, N, D).
            h: states (B N, p^2, Hx) of the pixels of each patch.
            both: whether both generated weights are normalised to columns of unit length.

        Returns:
            Without `h`: the generated weights (B, N, S) and the gain (Hx,) of the norm (None in the plain form). The gain is a
            copy, as FSDP frees the block's parameters when the call ends. With `h`: the next states.
        """
        generated = self.param_generator1(s)
        residual = "norm" in self._modules
        if h is None:
            return generated, bare_norm(self.norm).clone() if residual else None
        # The residual stays in the dtype of h; the layer gets the dtype of its weights.
        entered = self.norm(h.to(_layer_dtype(h, s))).to(h) if residual else h
        with torch.autocast(h.device.type, enabled=False) if autocast_dtype(h.device.type) else nullcontext():
            flat = generated.flatten(0, 1).to(h)
            out = generated_layers(entered, *split_generated(flat, h.shape[-1], both))
        return h + out if residual else out


class _FieldEmbedder(nn.Module):
    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(in_features, hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        """States (B N, p^2, Hx) from codes and cosine features (B N, p^2, C + F^2)."""
        return self.embedder(pixels)


class _FieldOutput(nn.Module):
    def __init__(self, hidden: int, channels: int, norm: bool):
        super().__init__()
        if norm:
            self.norm = nn.RMSNorm(hidden, eps=_EPS)
        self.linear = nn.Linear(hidden, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Codes (B N, p^2, C) from states (B N, p^2, Hx)."""
        return self.linear(self.norm(h) if "norm" in self._modules else h)


def _generator_is_bare(block: nn.Module) -> bool:
    return is_exactly(block, _FieldBlock) and is_silent(block) and is_bare_linear(block.param_generator1)


def _layer_dtype(h: Tensor, s: Tensor) -> torch.dtype:
    """Dtype of the layers' inputs: that of the patch features, as for the generators. Under autocast h stays, as autocast casts."""
    return h.dtype if autocast_dtype(h.device.type) else s.dtype


class NeuralFieldDecoder(nn.Module):
    """Pixels from patch features: generate the weights of the neural field and apply it (PixNerd, arXiv 2507.23268).

    Args:
        dim: D, width of the patch features.
        channels: C of the image.
        hidden: Hx, width of the field.
        depth: L, number of blocks.
        mlp_ratio: r.
        patch_size: p.
        max_freqs: F; the cosine features are F^2.
        normalise: "both" or "first", which generated weights are normalised to columns of unit length.
        form: "residual" or "plain", as in functional.neural_field. The plain form has no norms.
        patch_chunk: number of patches per chunk, rounded to whole rows of patches (at least one). Weights are generated one chunk
            at a time, and again in backward, so memory holds the generated weights of one chunk. None (default): no chunks.

    Parameter names follow PixNerd's (x_embedder.embedder.0, blocks.I.param_generator1, blocks.I.norm, final_layer.norm,
    final_layer.linear), and `load_pixnerd` takes its state dict. The last layer starts at zero: so does the output.

    Every layer may be wrapped, hooked, replaced, pruned, quantised, sharded or offloaded. `blocks.I(s)` and its
    `param_generator1(s)` are always called as modules. The fused op reads the weights of the remaining layers (x_embedder, the
    norms, final_layer) as tensors if these layers are nn.Linear and nn.RMSNorm without hooks. PyTorch's parametrizations,
    weight_norm, spectral_norm and pruning are applied first; FSDP2 and accelerate's offload bring the weights.

    If one of those layers is anything else, such as LoRA's layer, or has another hook, or if a hook on all modules is registered,
    then all layers are called as modules on the pixels of each patch. That takes the time and memory of PixNerd's plain code
    (states of all pixels). These calls get tensors in the dtype of s.

    With patch_chunk, generators that must be called as modules run again in backward for each chunk, and their hooks too.
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
        sizes = {"dim": dim, "channels": channels, "hidden": hidden, "depth": depth, "mlp_ratio": mlp_ratio}
        for name, value in {**sizes, "patch_size": patch_size, "max_freqs": max_freqs}.items():
            check_positive(name, value)
        self.patch_chunk = patch_chunk
        self.patch_size, self.mlp_ratio, self.normalise, self.form = patch_size, mlp_ratio, normalise, form
        self.dim, self.max_freqs = dim, max_freqs
        norm = form == "residual"
        self.x_embedder = _FieldEmbedder(channels + max_freqs**2, hidden)
        self.blocks = nn.ModuleList(_FieldBlock(dim, hidden, mlp_ratio, norm) for _ in range(depth))
        self.final_layer = _FieldOutput(hidden, channels, norm)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x: Tensor, s: Tensor, *, patch_size: int | None = None) -> Tensor:
        """Pixels (B, C, H, W) from x (B, C, H, W) and patch features s (B, N, D), patches in row-major order.

        Args:
            patch_size: pixels along the side of a patch in x, if it differs from training. A field is a function of the position
                in its patch, from 0 at the first pixel to 1 at the last. So at 2 p - 1 every second pixel is at the position of
                a pixel at p. N is H W / patch_size^2.

        Differentiable in x, s and the parameters. Second derivatives and forward mode run at the cost of the plain formula. With
        patch_chunk the fused op has only first derivatives; torch.func's transforms and forward mode ignore patch_chunk.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        p = self.patch_size if patch_size is None else patch_size
        self._check(x, s, p)
        fused = self._can_fuse()
        # Backward of a chunk runs the forward again, which is impossible inside a transform.
        whole = self.patch_chunk is None or in_transform()
        if fused and not whole and all(map(_generator_is_bare, self.blocks)):
            generators = [bare_linear(v.param_generator1) for v in self.blocks]
            # If the dtypes differ, call the generators: a mixed-precision policy of FSDP2 casts s in the call.
            if autocast_dtype(s.device.type) or all(weight.dtype == s.dtype for weight, _ in generators):
                gains = torch.stack([bare_norm(v.norm) for v in self.blocks]) if self.form == "residual" else None
                return chunked_field(self.patch_chunk, x, s, self._shared(gains), generators, self._options(p))
        shared = self._shared(None) if fused else None
        if whole:
            return self._decode(x, s, p, shared)
        return chunked_calls(self.patch_chunk, x, s, p, lambda x, s: self._decode(x, s, p, shared))

    def _check(self, x: Tensor, s: Tensor, p: int) -> None:
        check_image("x", x)
        check_index("patch_size", p)
        check_positive("patch_size", p)
        check_tensor("s", s, FLOAT_DTYPES, "(B, N, D)", 3)
        batch, _, height, width = x.shape
        if height % p or width % p:
            raise ValueError(f"x: wanted height and width divisible by patch_size {p}; got {tuple(x.shape)}")
        patches = (height // p) * (width // p)
        if s.shape != (batch, patches, self.dim):
            raise ValueError(
                f"s: wanted shape ({batch}, {patches}, {self.dim}) for x {tuple(x.shape)} in patches of {p} x {p}; "
                f"got {tuple(s.shape)}"
            )

    def _options(self, p: int) -> dict:
        return {
            "patch_size": p,
            "mlp_ratio": self.mlp_ratio,
            "eps": _EPS,
            "normalise": self.normalise,
            "form": self.form,
        }

    def _can_fuse(self) -> bool:
        """Whether the fused op may read the weights of the embedder, the norms and the last layer as tensors."""
        enter, last = self.x_embedder, self.final_layer
        if any_global_hook() or not is_exactly(enter, _FieldEmbedder) or not is_exactly(last, _FieldOutput):
            return False
        layers = enter.embedder
        if not is_exactly(layers, nn.Sequential) or len(layers) != 1:
            return False
        if not (is_silent(enter) and is_silent(layers) and is_silent(last)):
            return False
        if not (is_bare_linear(layers[0]) and is_bare_linear(last.linear)):
            return False
        if self.form != "residual":
            return True
        for block in self.blocks:
            # The gain is read inside the call of its block. If the block is wrapped or has hooks, that call may gather the gain.
            sharded = not is_exactly(block, _FieldBlock) or not is_silent(block)
            if not is_bare_norm(getattr(block, "norm", None), _EPS, sharded=sharded):
                return False
        return is_bare_norm(last.norm, _EPS)

    def _shared(self, gains: Tensor | None) -> tuple[Tensor | None, ...]:
        """The arguments of neural_field after the generated weights; `gains` are those of the blocks (L, Hx)."""
        out_gain = bare_norm(self.final_layer.norm) if self.form == "residual" else None
        return (*bare_linear(self.x_embedder.embedder[0]), gains, out_gain, *bare_linear(self.final_layer.linear))

    def _decode(self, x: Tensor, s: Tensor, p: int, shared: tuple[Tensor | None, ...] | None) -> Tensor:
        """Decode all patches of x at once: by the fused op, or by module calls if `shared` is None."""
        if shared is None:
            return self._decode_by_calls(x, s, p)
        weights, gains = zip(*[block(s) for block in self.blocks])
        gains = torch.stack(gains) if self.form == "residual" else None
        return functional.neural_field(
            x, torch.stack(weights, dim=2), *shared[:2], gains, *shared[3:], **self._options(p)
        )

    def _decode_by_calls(self, x: Tensor, s: Tensor, p: int) -> Tensor:
        """Compute the formula of ops/neural_field/reference.py with a module call per layer."""
        pixels = to_patches(x.to(compute_dtype(x.dtype)), p)
        dtype = _layer_dtype(pixels, s)
        table = cosine_features(p, self.max_freqs, dtype=pixels.dtype, device=x.device)
        h = self.x_embedder(torch.cat([pixels, table.expand(pixels.shape[0], -1, -1)], dim=-1).to(dtype))
        h = h.to(pixels.dtype)
        for block in self.blocks:
            h = block(s, h, self.normalise == "both")
        out = from_patches(self.final_layer(h.to(dtype)), x.shape, p)
        cast = autocast_dtype(x.device.type)
        return out.to(x.device, x.dtype if cast is None or x.dtype == torch.float64 else cast).contiguous()

    def load_pixnerd(self, state_dict: dict[str, Tensor], *, first_block: int, prefix: str = "") -> None:
        """Load x_embedder, the field blocks and final_layer from a PixNerd state dict.

        PixNerd numbers all its blocks `blocks.I`, and its generator is the only layer of a Sequential, `param_generator1.0`. The
        name `param_generator1` is accepted too.

        Args:
            state_dict: of the whole PixNerd model, or of these layers.
            first_block: I of the first field block (22 for L/16, 26 for XL/16).
            prefix: prefix of all names, such as "ema_denoiser." in a training checkpoint of PixNerd.

        Raises:
            KeyError: naming the missing keys.
            RuntimeError: naming the keys with a wrong shape.
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
