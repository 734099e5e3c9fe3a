"""Settings of the neural field's Triton kernels, from sizes alone: tiles, warps, scratch memory, constants, compiler options.

Every result is a pure function and is cached: on small calls, finding the settings takes as long as the launches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime.registry import COMPILED_CHANNELS
from ...runtime.triton import INTERPRETED, compile_options

__all__ = [
    "TABLE_BLOCK",
    "Settings",
    "Sizes",
    "constants",
    "launch_of",
    "launch_settings",
    "matmul_path_of",
    "options_of",
    "patches_per_group",
    "patches_per_round",
    "scratch_of",
    "states_fit_in_gradients",
    "takes",
    "tiles_of",
    "tiles_per_program",
]

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: The smallest dimension of a matrix product in Triton.
_SMALLEST = 16
#: The kernels keep rows of up to this many hidden units on chip.
_LARGEST_HIDDEN = 128
#: Elements of a weight matrix that a program squares per step, to find the column norms.
_AREA = 2048
#: Elements of a weight matrix's gradient per step of the backward's last pass over them.
_BAND_AREA = 2048
#: Programs that keep the largest GPUs busy: two waves of backward_kernel. A program of another kernel takes several tiles only if
#: at least this many programs remain.
_PROGRAMS_AT_ONCE = 256
#: Most patches per round of the backward; backward_kernel runs one program per patch.
_PATCHES_PER_ROUND = 4096
#: Bytes of scratch memory per round, unless _PROGRAMS_AT_ONCE patches need more. At PixNerd's sizes a patch takes 71 KiB
#: (bf16, L = 4) to 300 KiB (fp32).
_SCRATCH = 2**30
#: Fewest patches that a program of enter_kernel sums over.
_SMALLEST_GROUP = 4
#: Most groups of patches per pixel that enter_kernel sums over, not counting a short last round.
_MOST_GROUPS = 256
#: Pixels and features per step of table_kernel and of finish_kernel.
TABLE_BLOCK, _FINISH_BLOCK = 16, 64


class Settings(NamedTuple):
    """Launch of one kernel.

    rows: pixels of a patch per tile; slice: columns of the inner axis (r Hx) per step.
    """

    rows: int
    slice: int
    num_warps: int
    num_stages: int


#: By kernel, 16-bit operands or not, Hx > 64 or not. Chosen to avoid register spills on sm_80, 90, 100 and 120. One exception:
#: the 16-bit backward with Hx > 64 spills up to 256 bytes on sm_80 and sm_120, outside its inner loops; every other setting we
#: tried spills there too. tests/flowseg_kernels/static/test_field_variants.py checks this.
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
#: Settings that replace these on each path of matrix products: warp-group instructions (sm_90), results in tensor memory (sm_10x),
#: operands that pass through registers (all others).
_OTHER_SETTINGS = {
    "warp_groups": {},
    # The exact exponential keeps more registers alive than the approximate tanh.
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
    """The properties of a call that decide the variants of its kernels.

    hidden, inner, p, channels: Hx, r Hx, pixels along a side of a patch, and C.
    operand: dtype that the operands of matrix products are rounded to.
    both, residual: normalise == "both", form == "residual".
    precision: of fp32 products, "ieee" or "tf32".
    matmul_path: a key of _OTHER_SETTINGS.
    aliased: states_fit_in_gradients.
    """

    hidden: int
    inner: int
    p: int
    channels: int
    operand: torch.dtype
    both: bool
    residual: bool
    precision: str
    matmul_path: str
    aliased: bool


def takes(sizes: Sizes) -> bool:
    """Return whether the Triton kernels take a call of these sizes."""
    return sizes.operand in _OPERANDS and sizes.hidden <= _LARGEST_HIDDEN and sizes.channels <= COMPILED_CHANNELS


@functools.cache
def matmul_path_of(device: int) -> str:
    """Return how a GPU multiplies matrices, a key of _OTHER_SETTINGS."""
    if torch.version.hip is not None:
        return "registers"
    return {9: "warp_groups", 10: "tensor_memory"}.get(torch.cuda.get_device_capability(device)[0], "registers")


def takes_tanh(operand: torch.dtype, residual: bool) -> bool:
    """Return whether SiLU uses the approximate tanh, whose error grows with |z|.

    In the residual form z is a normalised state times unit columns, so its size is that of the gain. In the plain form nothing
    bounds z.
    """
    return residual and operand == torch.bfloat16 and torch.version.hip is None


def launch_settings(
    kernel: str,
    hidden: int,
    inner: int,
    pixels: int,
    operand: torch.dtype,
    matmul_path: str = "warp_groups",
    residual: bool = True,
) -> Settings:
    """Return the settings of "forward", "states" (forward_kernel in the backward), "backward" or "enter" for Hx, r Hx, p^2."""
    sizes = (operand != torch.float32, hidden > 64)
    if matmul_path == "warp_groups" and not takes_tanh(operand, residual):
        matmul_path = "warp_groups, exact"
    names = (kernel, "forward") if kernel == "states" else (kernel,)
    keys = [(table, (name, *sizes)) for name in names for table in (_OTHER_SETTINGS[matmul_path], _SETTINGS)]
    chosen = next(table[key] for table, key in keys if key in table)
    rows = min(chosen.rows, max(_SMALLEST, triton.next_power_of_2(pixels)))
    # A few pixels cannot occupy many warps. The backward keeps four, as its warps also split the generated weights.
    warps = max(4 if kernel == "backward" else 1, chosen.num_warps * rows // chosen.rows)
    return Settings(rows, min(chosen.slice, max(_SMALLEST, triton.next_power_of_2(inner))), warps, chosen.num_stages)


@functools.cache
def settings_of(kernel: str, sizes: Sizes) -> Settings:
    return launch_settings(
        kernel, sizes.hidden, sizes.inner, sizes.p**2, sizes.operand, sizes.matmul_path, sizes.residual
    )


@functools.cache
def tiles_of(kernel: str, sizes: Sizes) -> int:
    """Return the number of tiles that a kernel splits the pixels of a patch into."""
    return -(-(sizes.p**2) // settings_of(kernel, sizes).rows)


def tiles_per_program(patches: int, pixels: int, rows: int) -> int:
    """Return how many tiles of a patch a program of forward_kernel takes in turn: 1, 2 or 4, more for more patches."""
    tiles = -(-pixels // rows)
    return next(n for n in (4, 2, 1) if tiles % n == 0 and (n == 1 or patches * tiles >= n * _PROGRAMS_AT_ONCE))


def patches_per_round(patches: int, scratch: int) -> int:
    """Return the number of patches per round of the backward, given the bytes of scratch per patch."""
    return min(patches, _PATCHES_PER_ROUND, max(_PROGRAMS_AT_ONCE, _SCRATCH // max(scratch, 1)))


def patches_per_group(patches: int) -> int:
    """Return the number of patches that a program of enter_kernel sums over."""
    return max(_SMALLEST_GROUP, -(-patches // _MOST_GROUPS))


def states_fit_in_gradients(hidden: int, inner: int, p: int, operand: torch.dtype, weights: torch.dtype) -> bool:
    """Return whether the states before all blocks but the first fit in the buffer of the generated weights' gradients."""
    return weights == operand and p * p <= 2 * inner


class Scratch(NamedTuple):
    """Elements of scratch memory per patch of a round. `state` and `later_states` have the products' dtype, the last three fp32.

    state: the state before the first block, and again the gradient of the state.
    later_states: the states before the other blocks, unless they are aliased.
    inverse_rms: 1 / rms of the states.
    inverse_lengths: the reciprocal column norms of the weights.
    sums: sums over pixels between the tiles of a patch.
    """

    state: int
    later_states: int
    inverse_rms: int
    inverse_lengths: int
    sums: int

    def bytes(self, operand: torch.dtype, grads: torch.dtype) -> int:
        return (self.state + self.later_states) * operand.itemsize + self.state * grads.itemsize + 4 * sum(self[2:])


@functools.cache
def scratch_of(sizes: Sizes, depth: int) -> tuple[Scratch, torch.dtype]:
    """Return the scratch per patch, and the dtype of the state's gradient, which passes through memory between tiles."""
    several = tiles_of("backward", sizes) > 1
    state = sizes.p**2 * sizes.hidden
    later_states = 0 if sizes.aliased else max(depth - 1, 0) * state
    sums = 2 * sizes.inner * sizes.hidden if several else 0
    found = Scratch(state, later_states, depth * sizes.p**2, depth * (sizes.inner + sizes.hidden), sums)
    return found, torch.float32 if several else sizes.operand


def constants(kernel: str, sizes: Sizes, tiles_per_program: int = 1) -> dict:
    """Return the constexpr arguments of a kernel. Only forward_kernel has tiles_per_program."""
    hidden, channels = sizes.hidden, sizes.channels
    padded_hidden, padded_channels = (max(_SMALLEST, triton.next_power_of_2(n)) for n in (hidden, channels))
    found = {"H": hidden, "P": sizes.p}
    if kernel == "table":
        return found | {"H_PADDED": padded_hidden, "C": channels, "BLOCK": TABLE_BLOCK}
    by_channel = {"C": channels, "C_PADDED": padded_channels}
    if kernel == "finish":
        tiles = {"FORWARD_TILES": tiles_of("states", sizes), "ENTER_TILES": tiles_of("enter", sizes)}
        return found | tiles | by_channel | {"RESIDUAL": sizes.residual, "BLOCK": _FINISH_BLOCK}
    chosen = settings_of(kernel, sizes)
    found |= {
        "H_PADDED": padded_hidden,
        "ROWS": chosen.rows,
        "OPERAND": _OPERANDS[sizes.operand],
        "PRECISION": sizes.precision,
        "UPCAST": INTERPRETED and sizes.operand != torch.float32,
    }
    if kernel == "enter":
        return found | by_channel
    padded_inner = max(_SMALLEST, triton.next_power_of_2(sizes.inner))
    found |= {
        "INNER": sizes.inner,
        "SLICE": chosen.slice,
        "BOTH": sizes.both,
        "RESIDUAL": sizes.residual,
        "TANH": takes_tanh(sizes.operand, sizes.residual),
        "ALIASED": sizes.aliased and kernel != "forward",
    }
    if kernel == "backward":
        return found | {"BAND": min(padded_inner, max(_SMALLEST, _BAND_AREA // padded_hidden))}
    found |= {"KEEP": kernel == "states", "TILES_PER_PROGRAM": tiles_per_program, "INNER_PADDED": padded_inner}
    return found | by_channel | {"AREA": _AREA}


@functools.cache
def options_of(kernel: str, sizes: Sizes) -> dict:
    """Return the compiler options of a kernel."""
    if kernel in ("table", "finish"):
        return compile_options(4, stages=1)
    chosen = settings_of(kernel, sizes)
    return compile_options(chosen.num_warps, stages=chosen.num_stages)


@functools.cache
def launch_of(kernel: str, sizes: Sizes, tiles_per_program: int = 1) -> dict:
    """Return the keyword arguments of a launch: constants and compiler options."""
    return constants(kernel, sizes, tiles_per_program) | options_of(kernel, sizes)
