"""Launches of the neural field's Triton kernels: settings from sizes alone, bounded scratch, second stage of the shared sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.registry import COMPILED_CHANNELS
from ...runtime.triton_forms import INTERPRETED, Variant, compile_options, on_device_of
from . import reference
from .triton_backward import backward_kernel, enter_kernel
from .triton_forward import features_kernel, forward_kernel

__all__ = ["Settings", "form", "launch_settings", "neural_field", "neural_field_bwd", "patches_at_once", "variants"]

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: A dimension of a matrix product has at least this many elements.
_SMALLEST = 16
#: The kernels hold rows of up to this many hidden units on chip.
_LARGEST_HIDDEN = 128
#: Elements of a weight matrix that a program squares at a time.
_AREA = 2048
#: Elements of the gradient of a weight matrix that a program takes up at a time.
_BAND_AREA = 2048
#: Patches in a round of the backward, a program of backward_kernel each: two waves on the largest GPUs. As many programs of the
#: other kernels at least, where several tiles or patches fall to one.
_PROGRAMS_AT_ONCE = 256
#: Patches that a program of enter_kernel sums over.
_SUMMED = 4
#: Numbers of the cosine features that a program writes.
_FEATURES = 1024


class Settings(NamedTuple):
    """One kernel's launch: pixels of a patch and columns of the wide axis in a step, warps, pipeline stages."""

    rows: int
    slice: int
    num_warps: int
    num_stages: int


#: By kernel, 16-bit operands or not, Hx above 64 or not. Chosen so that nothing spills on sm_80, 90, 100 and 120 but, on sm_80 and
#: 120, up to 256 bytes of "backward" in 16 bits with Hx above 64, outside its inner loops: every other setting tried spilled too.
#: tests/flowseg_kernels/static/test_field_forms.py holds it; the figures are in docs/notes/performance.md.
_SETTINGS = {
    ("forward", True, False): Settings(64, 64, 4, 2),
    ("forward", True, True): Settings(64, 32, 8, 1),
    ("forward", False, False): Settings(32, 32, 8, 1),
    ("forward", False, True): Settings(16, 16, 16, 1),
    ("states", True, False): Settings(64, 64, 4, 1),
    ("backward", True, False): Settings(256, 32, 8, 1),
    ("backward", True, True): Settings(32, 16, 8, 1),
    ("backward", False, False): Settings(32, 32, 8, 1),
    ("backward", False, True): Settings(16, 16, 8, 1),
    ("enter", True, False): Settings(64, 16, 4, 1),
    ("enter", True, True): Settings(32, 16, 4, 1),
    ("enter", False, False): Settings(32, 16, 4, 1),
    ("enter", False, True): Settings(16, 16, 4, 1),
}
#: Instead of these where a product's result goes to tensor memory (sm_10x), or its operands pass through registers.
_OTHER_SETTINGS = {
    "warp_groups": {},
    # There with an exact exponential, of which more is alive than of an approximate tanh.
    "warp_groups, exact": {
        ("backward", True, False): Settings(128, 32, 8, 1),
    },
    "tensor_memory": {
        ("backward", True, False): Settings(64, 32, 4, 1),
    },
    "registers": {
        ("forward", True, False): Settings(64, 32, 4, 2),
        ("forward", False, True): Settings(16, 16, 8, 2),
        ("states", True, False): Settings(32, 64, 4, 2),
        ("backward", True, False): Settings(64, 16, 8, 1),
        ("backward", False, False): Settings(32, 16, 8, 1),
        ("enter", False, True): Settings(16, 16, 8, 1),
    },
}


@functools.cache
def product_kind(device: int) -> str:
    """How a GPU multiplies matrices, a key of _OTHER_SETTINGS."""
    if torch.version.hip is not None:
        return "registers"
    return {9: "warp_groups", 10: "tensor_memory"}.get(torch.cuda.get_device_capability(device)[0], "registers")


def takes_tanh(operand: torch.dtype, residual: bool) -> bool:
    """Whether SiLU is by an approximate tanh. A normalised state times unit columns is of the size of its gain; in the plain form
    nothing bounds z, and with it the error."""
    return residual and operand == torch.bfloat16 and torch.version.hip is None


def launch_settings(
    kernel: str,
    hidden: int,
    wide: int,
    pixels: int,
    operand: torch.dtype,
    products: str = "warp_groups",
    residual: bool = True,
) -> Settings:
    """Settings of "forward", "states" (the forward kernel in the backward), "backward" or "enter" for Hx, r Hx, p^2."""
    form = (operand != torch.float32, hidden > 64)
    if products == "warp_groups" and not takes_tanh(operand, residual):
        products = "warp_groups, exact"
    names = (kernel, "forward") if kernel == "states" else (kernel,)
    keys = [(table, (name, *form)) for name in names for table in (_OTHER_SETTINGS[products], _SETTINGS)]
    chosen = next(table[key] for table, key in keys if key in table)
    rows = min(chosen.rows, max(_SMALLEST, triton.next_power_of_2(pixels)))
    # Few pixels are no work for many warps, except where the warps share out the generated weights.
    warps = max(4 if kernel == "backward" else 1, chosen.num_warps * rows // chosen.rows)
    return Settings(rows, min(chosen.slice, max(_SMALLEST, triton.next_power_of_2(wide))), warps, chosen.num_stages)


def tiles_of(
    kernel: str, hidden: int, wide: int, pixels: int, operand: torch.dtype, products: str, residual: bool
) -> int:
    """Steps that a kernel takes the pixels of a patch in."""
    return -(-pixels // launch_settings(kernel, hidden, wide, pixels, operand, products, residual).rows)


def tiles_together(patches: int, pixels: int, rows: int) -> int:
    """Tiles of a patch that a program of forward_kernel takes one after another: 1, 2 or 4, as the number of patches allows."""
    tiles = -(-pixels // rows)
    return next(n for n in (4, 2, 1) if tiles % n == 0 and (n == 1 or patches * tiles >= n * _PROGRAMS_AT_ONCE))


def patches_at_once(patches: int) -> int:
    """Patches that one round of the backward takes: what fills a GPU, or an eighth of all if that is more."""
    return min(patches, max(_PROGRAMS_AT_ONCE, -(-patches // 8)))


def constants(
    kernel: str,
    hidden: int,
    wide: int,
    p: int,
    channels: int,
    operand: torch.dtype,
    both: bool,
    residual: bool,
    precision: str,
    patches: int,
    products: str,
) -> dict:
    """The constexpr arguments of a kernel; what the products round to is `operand`; `patches` are those of one launch."""
    chosen = launch_settings(kernel, hidden, wide, p * p, operand, products, residual)
    padded = max(_SMALLEST, triton.next_power_of_2(hidden))
    found = {
        "H": hidden,
        "HP": padded,
        "P": p,
        "ROWS": chosen.rows,
        "OPERAND": _OPERANDS[operand],
        "PRECISION": precision,
        "UPCAST": INTERPRETED and operand != torch.float32,
    }
    if kernel != "enter":
        found |= {
            "WIDE": wide,
            "SLICE": chosen.slice,
            "BOTH": both,
            "RESIDUAL": residual,
            "TANH": takes_tanh(operand, residual),
        }
    if kernel == "backward":
        widest = max(_SMALLEST, triton.next_power_of_2(wide))
        return found | {"BAND": min(widest, max(_SMALLEST, _BAND_AREA // padded))}
    if kernel == "enter":
        found |= {"TOGETHER": _SUMMED}
    else:
        found |= {
            "KEEP": kernel == "states",
            "TOGETHER": tiles_together(patches, p * p, chosen.rows),
            "WIDEP": max(_SMALLEST, triton.next_power_of_2(wide)),
            "AREA": _AREA,
        }
    return found | {"C": channels, "CP": max(_SMALLEST, triton.next_power_of_2(channels))}


_KERNELS = {
    "forward": forward_kernel,
    "states": forward_kernel,
    "backward": backward_kernel,
    "enter": enter_kernel,
}
#: Arguments that are fp32 in memory whatever the operands are.
_FP32 = ("table", "norms", "scales", "sums", "positions", "partials", "grad_gains")
_INT32 = ("first", "columns", "per_image", "depth", "features", "patches")
_STRIDES = ("sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw")
_UNUSED = {"forward": ("grad", "states", "norms", "grads", "partials"), "states": ("out", "out_bias")}


def form(
    kernel: str, dtype: str = "bf16", hidden: int = 64, ratio: int = 2, p: int = 16, channels: int = 3, *, both: bool = True,
    residual: bool = True, precision: str = "ieee", patches: int = 1024, products: str = "warp_groups",
) -> Variant:  # fmt: skip
    """The compiled form of a kernel that a call on `patches` of one dtype ("fp32", "bf16" or "fp16") launches on an NVIDIA GPU."""
    operand = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wide = ratio * hidden
    tiled = tiles_of("backward", hidden, wide, p * p, operand, products, residual) > 1
    launched = patches if kernel == "forward" else patches_at_once(patches)
    found = constants(kernel, hidden, wide, p, channels, operand, both, residual, precision, launched, products)
    found |= {"UPCAST": False} | dict.fromkeys(_UNUSED.get(kernel, ()))

    def kind(argument: str) -> str:
        if argument in found:
            return "constexpr"
        if argument in _INT32:
            return "i32"
        if argument in _STRIDES:
            return "i64"
        if argument == "eps":
            return "fp32"
        return "*fp32" if argument in _FP32 or (argument == "grads" and tiled) else f"*{dtype}"

    chosen = launch_settings(kernel, hidden, wide, p * p, operand, products, residual)
    signature = {argument: kind(argument) for argument in _KERNELS[kernel].arg_names}
    options = compile_options(chosen.num_warps, stages=chosen.num_stages)
    name = f"neural_field {kernel} {dtype} Hx={hidden} r={ratio} p={p} C={channels}"
    return Variant(name + (" tf32" if precision == "tf32" else ""), _KERNELS[kernel], signature, found, options)


def variants(products: str = "warp_groups") -> Iterator[Variant]:
    for kernel in _KERNELS:
        made = functools.partial(form, kernel, products=products)
        yield made()
        yield made("bf16", 32, 4, 8)
        yield made("fp16", 128, 4, 32, 16)
        yield made("bf16", 16, 1, 4, 1, both=False, residual=False)
        yield made("fp32")
        yield made("fp32", precision="tf32")
        yield made("fp32", 128, 1)
    yield Variant(
        "neural_field features",
        features_kernel,
        {"out": "*fp32", "p": "i32", "freqs": "i32", "count": "i32", "BLOCK": "constexpr"},
        {"BLOCK": _FEATURES},
        compile_options(4),
    )
    yield form("backward", hidden=128, products=products)
    yield form("backward", "fp16", products=products)
    yield form("backward", ratio=4, residual=False, products=products)


class _Call:
    """One call: its sizes, and its tensors as the kernels want them."""

    def __init__(
        self, x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias, p, ratio, eps,
        normalise, form,
    ):  # fmt: skip
        self.x, self.weights, self.embed = x, weights.contiguous(), embed_weight.contiguous()
        self.gains, self.out_gain = norm_weight.contiguous(), out_norm_weight.contiguous()
        self.out_weight, self.out_bias = out_weight.contiguous(), out_bias.contiguous()
        self.p, self.eps = p, eps
        self.columns = x.shape[3] // p
        self.per_image = self.columns * (x.shape[2] // p)
        self.patches = x.shape[0] * self.per_image
        self.depth = weights.shape[2]
        self.hidden = embed_bias.shape[0]
        self.wide = ratio * self.hidden
        tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
        self.operand = functools.reduce(torch.promote_types, (v.dtype for v in tensors))
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        self.products = product_kind(x.device.index) if x.is_cuda else "warp_groups"
        self.residual = form == "residual"
        self.options = (normalise == "both", self.residual, precision)

    def runs(self) -> bool:
        """Whether these kernels take the call."""
        return self.operand in _OPERANDS and self.hidden <= _LARGEST_HIDDEN and self.x.shape[1] <= COMPILED_CHANNELS

    def launch(self, kernel: str, patches: int) -> dict:
        """Keyword arguments of a launch on some patches: constants and compiler options."""
        chosen = launch_settings(kernel, self.hidden, self.wide, self.p**2, self.operand, self.products, self.residual)
        found = constants(
            kernel,
            self.hidden,
            self.wide,
            self.p,
            self.x.shape[1],
            self.operand,
            *self.options,
            patches,
            self.products,
        )
        return found | compile_options(chosen.num_warps, stages=chosen.num_stages)

    def tiles(self, kernel: str) -> int:
        """Tiles of a patch."""
        return tiles_of(kernel, self.hidden, self.wide, self.p**2, self.operand, self.products, self.residual)

    def forward(
        self, kernel: str, patches: int, table, scales, first: int, *, out=None, grad=None, scratch=(None,) * 4
    ) -> None:
        """Run forward_kernel on some patches, as "forward" into `out` or as "states" from `grad` into `scratch`."""
        launch = self.launch(kernel, patches)
        states, norms, grads, partials = scratch
        forward_kernel[(patches * self.tiles(kernel) // launch["TOGETHER"],)](
            self.x, self.weights, self.embed, table, self.gains, self.out_gain, self.out_weight,
            None if out is None else self.out_bias, out, grad, states, norms, scales, grads, partials,
            first, self.columns, self.per_image, self.depth, self.embed.shape[1], *self.x.stride(),
            *(self.x if grad is None else grad).stride(), self.eps, **launch,
        )  # fmt: skip

    def features(self) -> Tensor:
        """reference.cosine_features in one launch."""
        freqs = math.isqrt(self.embed.shape[1] - self.x.shape[1])
        found = self.x.new_empty(self.p**2, freqs**2, dtype=torch.float32)
        programs = -(-found.numel() // _FEATURES)
        features_kernel[(programs,)](found, self.p, freqs, found.numel(), _FEATURES, **compile_options(4))
        return found

    def table(self, bias: Tensor, features: Tensor) -> Tensor:
        """(p^2, Hx): what the embedding adds at each pixel of every patch."""
        return torch.addmm(bias.float(), features, self.embed[:, self.x.shape[1] :].float().T)


def neural_field(x: Tensor, weights: Tensor, embed_weight: Tensor, embed_bias: Tensor, *rest) -> Tensor:
    """As reference.neural_field, which also takes what these kernels do not: fp64, and Hx above 128."""
    call = _Call(x, weights, embed_weight, embed_bias, *rest)
    if not call.runs():
        return reference.neural_field(x, weights, embed_weight, embed_bias, *rest)
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    with on_device_of(x):
        table = call.table(embed_bias, call.features())
        scales = x.new_empty(call.patches, call.depth, call.wide + call.hidden, dtype=torch.float32)
        call.forward("forward", call.patches, table, scales, 0, out=out)
    return out


def neural_field_bwd(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    """As reference.neural_field_bwd: gradients of the eight tensors, empty where not needed."""
    *inputs, needs = arguments
    call = _Call(*inputs)
    if not call.runs():
        return reference.neural_field_bwd(grad, *arguments)
    x, channels, hidden, depth = call.x, call.x.shape[1], call.hidden, call.depth
    count = patches_at_once(call.patches)
    tiles = {kernel: call.tiles(kernel) for kernel in ("states", "backward", "enter")}
    several = tiles["backward"] > 1
    scratch = functools.partial(torch.empty, device=x.device, dtype=torch.float32)
    states = scratch(count, depth, call.p**2, hidden, dtype=call.operand)
    grads = scratch(count, call.p**2, hidden, dtype=torch.float32 if several else call.operand)
    norms = scratch(count, depth, call.p**2)
    scales = scratch(count, depth, call.wide + hidden)
    between_tiles = scratch(count if several else 0, 2 * call.wide * hidden)
    shares = -(-count // _SUMMED)
    leaving = scratch(count * tiles["states"], (1 + channels) * hidden)
    entering = scratch(shares * tiles["enter"], hidden * channels)
    positions = scratch(shares, call.p**2, hidden)
    gains_shares = scratch(count, depth * hidden)
    by_out = x.new_zeros((1 + channels) * hidden, dtype=torch.float32)
    by_pixel = x.new_zeros(hidden * channels, dtype=torch.float32)
    by_position = x.new_zeros(call.p**2, hidden, dtype=torch.float32)
    grad_gains = x.new_zeros(depth * hidden, dtype=torch.float32)
    grad_x, grad_weights = x.new_empty(x.shape), torch.empty_like(call.weights)
    with on_device_of(x):
        features = call.features()
        table = call.table(inputs[3], features)
        for first in range(0, call.patches, max(count, 1)):
            now = min(count, call.patches - first)
            call.forward("states", now, table, scales, first, grad=grad, scratch=(states, norms, grads, leaving))
            if depth:
                backward_kernel[(now,)](
                    call.weights, call.gains, states, norms, scales, grad_weights, gains_shares, grads, between_tiles, first, depth,
                    **call.launch("backward", now),
                )  # fmt: skip
            shares = -(-now // _SUMMED)
            enter_kernel[(shares * tiles["enter"],)](
                x, call.embed, grads, grad_x, positions, entering,
                first, call.columns, call.per_image, call.embed.shape[1], *x.stride(), now, **call.launch("enter", now),
            )  # fmt: skip
            # Sums over patches in a fixed order: the programs of a round, then the rounds.
            by_out += leaving[: now * tiles["states"]].sum(0)
            by_pixel += entering[: shares * tiles["enter"]].sum(0)
            by_position += positions[:shares].sum(0)
            if call.residual:
                grad_gains += gains_shares[:now].sum(0)
    sizes = (hidden, channels * hidden)
    # Copies: an output of an op must not be a view of a larger tensor.
    grad_out_gain, grad_out_weight = (part.clone() for part in by_out.split(sizes))
    if not call.residual:
        grad_gains, grad_out_gain = torch.zeros_like(call.gains), torch.zeros_like(call.out_gain)
    found = (
        grad_x,
        grad_weights,
        torch.cat((by_pixel.view(hidden, channels), reference.by_features(by_position, features)), dim=1),
        by_position.sum(0),
        grad_gains,
        grad_out_gain,
        grad_out_weight,
        grad.sum((0, 2, 3), dtype=torch.float32),
    )
    return tuple(
        f.to(v.dtype).reshape(v.shape).contiguous() if need else v.new_empty(0)
        for f, v, need in zip(found, inputs, needs)
    )
