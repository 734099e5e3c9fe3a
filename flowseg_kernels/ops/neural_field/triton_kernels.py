"""Launches of the neural field's Triton kernels: settings from sizes alone, bounded scratch, one sum of all shares at the end.

Small calls are bound by this code, not by the GPU: what sizes alone decide is found once, and a backward of up to 4,096 patches
makes the same few launches and calls of PyTorch whatever their number (tests/flowseg_kernels/static/test_field_host.py)."""

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
from .triton_backward import backward_kernel, enter_kernel, finish_kernel
from .triton_forward import forward_kernel, table_kernel

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
#: Programs of a launch that keep the largest GPUs busy, two waves of the backward's.
_PROGRAMS_AT_ONCE = 256
#: Patches that a round of the backward takes, a program of backward_kernel each, and bytes of scratch that it takes where these are
#: enough for _PROGRAMS_AT_ONCE patches: at PixNerd's sizes 71 KiB (bf16, L = 4) to 300 KiB (fp32) for each patch.
_PATCHES_AT_ONCE = 4096
_SCRATCH = 2**30
#: Patches that a program of enter_kernel sums over, at least.
_SUMMED = 4
#: Sums over patches that the programs of enter_kernel leave for each pixel, at most, but for a short last round.
_SHARES = 256
#: Pixels and features in a step of table_kernel and of finish_kernel.
_TABLE_BLOCK, _FINISH_BLOCK = 16, 64


class Settings(NamedTuple):
    """One kernel's launch: pixels of a patch and columns of the wide axis in a step, warps, pipeline stages."""

    rows: int
    slice: int
    num_warps: int
    num_stages: int


#: By kernel, 16-bit operands or not, Hx above 64 or not. Chosen so that nothing spills on sm_80, 90, 100 and 120 but, on sm_80 and
#: 120, up to 256 bytes of "backward" in 16 bits with Hx above 64, outside its inner loops: every other setting tried spilled too.
#: tests/flowseg_kernels/static/test_field_forms.py holds it; the figures are in docs/notes/static_counts.md.
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


class Sizes(NamedTuple):
    """Of one call, what the forms of its kernels depend on; what the products round to is `operand`."""

    hidden: int
    wide: int
    p: int
    channels: int
    operand: torch.dtype
    both: bool
    residual: bool
    precision: str
    products: str
    lent: bool


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


@functools.cache
def tiles_of(kernel: str, sizes: Sizes) -> int:
    """Steps that a kernel takes the pixels of a patch in."""
    return -(-(sizes.p**2) // settings_of(kernel, sizes).rows)


@functools.cache
def settings_of(kernel: str, sizes: Sizes) -> Settings:
    return launch_settings(kernel, sizes.hidden, sizes.wide, sizes.p**2, sizes.operand, sizes.products, sizes.residual)


def tiles_together(patches: int, pixels: int, rows: int) -> int:
    """Tiles of a patch that a program of forward_kernel takes one after another: 1, 2 or 4, as the number of patches allows."""
    tiles = -(-pixels // rows)
    return next(n for n in (4, 2, 1) if tiles % n == 0 and (n == 1 or patches * tiles >= n * _PROGRAMS_AT_ONCE))


def patches_at_once(patches: int, scratch: int) -> int:
    """Patches that one round of the backward takes, with `scratch` bytes for each."""
    return min(patches, _PATCHES_AT_ONCE, max(_PROGRAMS_AT_ONCE, _SCRATCH // max(scratch, 1)))


def patches_together(patches: int) -> int:
    """Patches that a program of enter_kernel sums over."""
    return max(_SUMMED, -(-patches // _SHARES))


def lends(hidden: int, wide: int, p: int, operand: torch.dtype, weights: torch.dtype) -> bool:
    """Whether the states before the later blocks fit where the gradients of the generated weights will be."""
    return weights == operand and p * p <= 2 * wide


class Scratch(NamedTuple):
    """Elements that the backward keeps for each patch of a round, in the dtype of the products or in fp32."""

    state: int
    later: int
    norms: int
    scales: int
    raw: int

    def bytes(self, operand: torch.dtype, grads: torch.dtype) -> int:
        return (self.state + self.later) * operand.itemsize + self.state * grads.itemsize + 4 * sum(self[2:])


@functools.cache
def scratch_of(sizes: Sizes, depth: int) -> tuple[Scratch, torch.dtype]:
    """And the dtype of the gradient of the state, which lies in memory between tiles."""
    several = tiles_of("backward", sizes) > 1
    state = sizes.p**2 * sizes.hidden
    later = 0 if sizes.lent else max(depth - 1, 0) * state
    raw = 2 * sizes.wide * sizes.hidden if several else 0
    found = Scratch(state, later, depth * sizes.p**2, depth * (sizes.wide + sizes.hidden), raw)
    return found, torch.float32 if several else sizes.operand


def constants(kernel: str, sizes: Sizes, together: int = 1) -> dict:
    """The constexpr arguments of a kernel; `together`: tiles that a program of forward_kernel takes."""
    hidden, channels = sizes.hidden, sizes.channels
    padded, padded_channels = (max(_SMALLEST, triton.next_power_of_2(n)) for n in (hidden, channels))
    found = {"H": hidden, "P": sizes.p}
    if kernel == "table":
        return found | {"HP": padded, "C": channels, "BLOCK": _TABLE_BLOCK}
    if kernel == "finish":
        tiles = {"LEAVING": tiles_of("states", sizes), "ENTERING": tiles_of("enter", sizes)}
        return (
            found | tiles | {"C": channels, "CP": padded_channels, "RESIDUAL": sizes.residual, "BLOCK": _FINISH_BLOCK}
        )
    chosen = settings_of(kernel, sizes)
    found |= {
        "HP": padded,
        "ROWS": chosen.rows,
        "OPERAND": _OPERANDS[sizes.operand],
        "PRECISION": sizes.precision,
        "UPCAST": INTERPRETED and sizes.operand != torch.float32,
    }
    if kernel == "enter":
        return found | {"C": channels, "CP": padded_channels}
    widest = max(_SMALLEST, triton.next_power_of_2(sizes.wide))
    found |= {
        "WIDE": sizes.wide,
        "SLICE": chosen.slice,
        "BOTH": sizes.both,
        "RESIDUAL": sizes.residual,
        "TANH": takes_tanh(sizes.operand, sizes.residual),
        "LENT": sizes.lent and kernel != "forward",
    }
    if kernel == "backward":
        return found | {"BAND": min(widest, max(_SMALLEST, _BAND_AREA // padded))}
    found |= {"KEEP": kernel == "states", "TOGETHER": together, "WIDEP": widest, "AREA": _AREA}
    return found | {"C": channels, "CP": padded_channels}


@functools.cache
def options_of(kernel: str, sizes: Sizes) -> dict:
    """Compiler options of a kernel."""
    if kernel in ("table", "finish"):
        return compile_options(4, stages=1)
    chosen = settings_of(kernel, sizes)
    return compile_options(chosen.num_warps, stages=chosen.num_stages)


@functools.cache
def launch_of(kernel: str, sizes: Sizes, together: int = 1) -> dict:
    """Keyword arguments of a launch: constants and compiler options. Kept, as finding them takes as long as the launch."""
    return constants(kernel, sizes, together) | options_of(kernel, sizes)


_KERNELS = {
    "forward": forward_kernel,
    "states": forward_kernel,
    "backward": backward_kernel,
    "enter": enter_kernel,
    "table": table_kernel,
    "finish": finish_kernel,
}
#: Arguments that are fp32 in memory whatever the operands are.
_FP32 = ("table", "waves", "norms", "scales", "raw", "partials", "by_patch", "by_share")
_INT32 = (
    "first", "columns", "per_image", "depth", "features", "sums", "patches", "shares", "together", "freqs",
)  # fmt: skip
_STRIDES = ("sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw")
_UNUSED = {
    "forward": ("grad", "states", "later", "norms", "grads", "partials"),
    "states": ("out", "out_bias"),
}


def form(
    kernel: str, dtype: str = "bf16", hidden: int = 64, ratio: int = 2, p: int = 16, channels: int = 3, *, both: bool = True,
    residual: bool = True, precision: str = "ieee", patches: int = 1024, products: str = "warp_groups",
) -> Variant:  # fmt: skip
    """The compiled form of a kernel that a call on `patches` of one dtype ("fp32", "bf16" or "fp16") launches on an NVIDIA GPU."""
    operand = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wide = ratio * hidden
    lent = lends(hidden, wide, p, operand, operand)
    sizes = Sizes(hidden, wide, p, channels, operand, both, residual, precision, products, lent)
    together = 1
    if kernel in ("forward", "states"):
        together = tiles_together(patches, p * p, settings_of(kernel, sizes).rows)
    found = constants(kernel, sizes, together)
    found |= dict.fromkeys(_UNUSED.get(kernel, ("later",) if kernel == "backward" and lent else ()))
    if "UPCAST" in found:
        found["UPCAST"] = False

    def kind(argument: str) -> str:
        if argument in found:
            return "constexpr"
        if argument in _INT32:
            return "i32"
        if argument in _STRIDES:
            return "i64"
        if argument == "eps":
            return "fp32"
        tiled = argument == "grads" and tiles_of("backward", sizes) > 1
        return "*fp32" if argument in _FP32 or tiled else f"*{dtype}"

    signature = {argument: kind(argument) for argument in _KERNELS[kernel].arg_names}
    name = f"neural_field {kernel} {dtype} Hx={hidden} r={ratio} p={p} C={channels}"
    return Variant(
        name + (" tf32" if precision == "tf32" else ""), _KERNELS[kernel], signature, found, options_of(kernel, sizes)
    )


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
    yield form("backward", hidden=128, products=products)
    yield form("backward", "fp16", products=products)
    yield form("backward", ratio=4, residual=False, products=products)


class _Call:
    """One call: its sizes, and its tensors as the kernels want them."""

    def __init__(
        self, x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias, p, ratio, eps,
        normalise, form,
    ):  # fmt: skip
        self.tensors = (x, weights, embed_weight, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias)
        shared = (v.contiguous() for v in self.tensors[1:])
        self.x = x
        self.weights, self.embed, self.bias, self.gains, self.out_gain, self.out_weight, self.out_bias = shared
        batch, channels, height, width = x.shape
        self.eps = eps
        self.columns = width // p
        self.per_image = self.columns * (height // p)
        self.patches = batch * self.per_image
        self.depth = weights.shape[2]
        hidden = embed_bias.shape[0]
        wide = ratio * hidden
        dtypes = {v.dtype for v in self.tensors}
        operand = x.dtype if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        products = product_kind(x.device.index) if x.is_cuda else "warp_groups"
        lent = lends(hidden, wide, p, operand, weights.dtype)
        self.sizes = Sizes(
            hidden, wide, p, channels, operand, normalise == "both", form == "residual", precision, products, lent
        )
        self.freqs = math.isqrt(embed_weight.shape[1] - channels)

    def runs(self) -> bool:
        """Whether these kernels take the call."""
        sizes = self.sizes
        return sizes.operand in _OPERANDS and sizes.hidden <= _LARGEST_HIDDEN and sizes.channels <= COMPILED_CHANNELS

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def table(self, waves: Tensor | None = None) -> Tensor:
        """(p^2, Hx): what the embedding adds at each pixel of every patch. `waves` (p^2, F^2) gets the cosine features."""
        pixels = self.sizes.p**2
        found = self.empty(pixels, self.sizes.hidden)
        table_kernel[(-(-pixels // _TABLE_BLOCK),)](
            self.embed, self.bias, found, waves, self.freqs, **launch_of("table", self.sizes)
        )
        return found

    def forward(
        self, kernel: str, patches: int, table, scales, first: int, *, out=None, grad=None, scratch=(None,) * 5, sums=0
    ) -> None:
        """Run forward_kernel on some patches, as "forward" into `out` or as "states" from `grad` into `scratch`."""
        sizes = self.sizes
        together = tiles_together(patches, sizes.p**2, settings_of(kernel, sizes).rows)
        states, later, norms, grads, partials = scratch
        forward_kernel[(patches * tiles_of(kernel, sizes) // together,)](
            self.x, self.weights, self.embed, table, self.gains, self.out_gain, self.out_weight,
            None if out is None else self.out_bias, out, grad, states, later, norms, scales, grads, partials,
            first, self.columns, self.per_image, self.depth, self.embed.shape[1], sums, *self.x.stride(),
            *(self.x if grad is None else grad).stride(), self.eps, **launch_of(kernel, sizes, together),
        )  # fmt: skip


def neural_field(x: Tensor, weights: Tensor, embed_weight: Tensor, embed_bias: Tensor, *rest) -> Tensor:
    """As reference.neural_field, which also takes what these kernels do not: fp64, and Hx above 128."""
    call = _Call(x, weights, embed_weight, embed_bias, *rest)
    if not call.runs():
        return reference.neural_field(x, weights, embed_weight, embed_bias, *rest)
    out = call.empty(*x.shape, dtype=x.dtype)
    if out.numel() == 0:
        return out
    with on_device_of(x):
        table = call.table()
        scales = call.empty(call.patches, call.depth, call.sizes.wide + call.sizes.hidden)
        call.forward("forward", call.patches, table, scales, 0, out=out)
    return out


class _Backward:
    """One call's backward: scratch of a round, and a row for each patch and for each share of enter_kernel, summed at the end."""

    def __init__(self, call: _Call, grad: Tensor):
        self.call, self.grad = call, grad
        sizes, depth = call.sizes, call.depth
        per_patch, kept = scratch_of(sizes, depth)
        self.at_once = patches_at_once(call.patches, per_patch.bytes(sizes.operand, kept))
        count = self.at_once
        self.states = call.empty(count, per_patch.state, dtype=sizes.operand)
        self.grads = call.empty(count, per_patch.state, dtype=kept)
        self.norms = call.empty(count, per_patch.norms)
        self.scales = call.empty(count, per_patch.scales)
        self.raw = call.empty(count, per_patch.raw)
        self.grad_x, self.grad_weights = (call.empty(*v.shape, dtype=v.dtype) for v in call.tensors[:2])
        self.later = self.grad_weights if sizes.lent else call.empty(count, per_patch.later, dtype=sizes.operand)
        self.together = patches_together(call.patches)
        self.tiles = {kernel: tiles_of(kernel, sizes) for kernel in ("states", "enter")}
        leaving = (1 + sizes.channels) * sizes.hidden + sizes.channels
        self.by_patch = call.empty(call.patches, depth * sizes.hidden + self.tiles["states"] * leaving)
        shares = sum(-(-now // self.together) for _, now in self.rounds())
        entering = sizes.p**2 + self.tiles["enter"] * sizes.channels
        self.by_share = call.empty(shares, entering * sizes.hidden)
        self.waves = call.empty(sizes.p**2, call.freqs**2)

    def rounds(self) -> Iterator[tuple[int, int]]:
        """First patch and number of patches of each."""
        for first in range(0, self.call.patches, max(self.at_once, 1)):
            yield first, min(self.at_once, self.call.patches - first)

    def patches(self) -> None:
        """Gradients of x and of the generated weights, and the rows of shares."""
        call, sizes, sums = self.call, self.call.sizes, self.by_patch.shape[1]
        table = call.table(self.waves)
        later = None if sizes.lent else self.later
        scratch = self.states, self.later, self.norms, self.grads, self.by_patch
        shares_before = 0
        for first, now in self.rounds():
            call.forward("states", now, table, self.scales, first, grad=self.grad, scratch=scratch, sums=sums)
            if call.depth:
                backward_kernel[(now,)](
                    call.weights, call.gains, self.states, later, self.norms, self.scales, self.grad_weights,
                    self.by_patch, self.grads, self.raw, first, call.depth, sums, **launch_of("backward", sizes),
                )  # fmt: skip
            shares = -(-now // self.together)
            enter_kernel[(shares * self.tiles["enter"],)](
                call.x, call.embed, self.grads, self.grad_x, self.by_share, first, call.columns, call.per_image,
                call.embed.shape[1], *call.x.stride(), now, shares_before, self.together, **launch_of("enter", sizes),
            )  # fmt: skip
            shares_before += shares

    def shared(self) -> tuple[Tensor, ...]:
        """Gradients of what patches share, by sums over the rows in a fixed order."""
        call, sizes = self.call, self.call.sizes
        made = [call.empty(*v.shape, dtype=v.dtype) for v in call.tensors[2:]]
        embed, bias, gains, out_gain, out_weight, out_bias = made
        if not sizes.residual:
            gains, out_gain = gains.zero_(), out_gain.zero_()
        finish_kernel[(sizes.hidden,)](
            self.by_patch.sum(0), self.by_share.sum(0), self.waves, embed, bias, gains, out_gain, out_weight, out_bias,
            call.freqs, call.depth, **launch_of("finish", sizes),
        )  # fmt: skip
        return embed, bias, gains, out_gain, out_weight, out_bias


def neural_field_bwd(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    """As reference.neural_field_bwd: gradients of the eight tensors, empty where not needed."""
    *inputs, needs = arguments
    call = _Call(*inputs)
    if not call.runs():
        return reference.neural_field_bwd(grad, *arguments)
    with on_device_of(call.x):
        work = _Backward(call, grad)
        work.patches()
        found = (work.grad_x, work.grad_weights, *work.shared())
    return tuple(f if need else f.new_empty(0) for f, need in zip(found, needs))
