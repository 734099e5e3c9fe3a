"""Variants of the Triton kernels for ahead-of-time compilation: one set of argument types, constants and options each.

A launch on a GPU compiles such a variant on its own. Without a GPU these lists say which variants the launchers would ask for.
`compiled` makes the machine code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowseg_kernels.ops.class_probabilities import triton_kernels as class_probabilities
from flowseg_kernels.ops.class_probabilities.reference import FORMS
from flowseg_kernels.ops.decode_confusion import triton_kernels as decode_confusion
from flowseg_kernels.ops.distance_correction import triton_kernels as distance_correction
from flowseg_kernels.ops.distance_correction.reference import TRANSFORMS
from flowseg_kernels.ops.flow_interpolate import triton_kernels as flow_interpolate
from flowseg_kernels.ops.flow_loss import triton_kernels as flow_loss
from flowseg_kernels.ops.nearest_centroid import triton_kernels as nearest_centroid
from flowseg_kernels.ops.neural_field import triton_launch as field
from flowseg_kernels.ops.neural_field import triton_settings as field_settings
from flowseg_kernels.ops.top_classes import triton_kernels as top_classes
from flowseg_kernels.runtime.triton import VECTOR, compile_options, elementwise_block

__all__ = [
    "PIXEL_OPS",
    "Variant",
    "compiled",
    "compiler",
    "every_variant",
    "field_variant",
    "field_variants",
    "pixel_variants",
]

#: Arguments of the per-pixel kernels that are numbers and not sizes.
_FLOATS = ("eps", "inverse_temperature", "max_norm", "weight", "t_min", "grid_low", "grid_scale")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of a kernel.

    signature: type of each argument ("*fp32", "i64", "constexpr", ...).
    constants: value of each constexpr argument.
    options: compiler options, such as num_warps.
    """

    name: str
    kernel: Callable
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]


def compiler() -> str:
    """Return the compiler's name and version, such as "triton 3.9.0"."""
    return f"triton {triton.__version__}"


def compiled(variant: Variant, target: str):
    """Return Triton's compiled kernel for "sm_80", ..., "gfx942".

    Pointers are declared 16-byte aligned: tensors are, so a launch compiles that variant.
    """
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(variant.signature.values()) if kind[0] == "*"}
    constants, options = dict(variant.constants), dict(variant.options)
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
        constants = {k: "gcn" if value == "ptx" else value for k, value in constants.items()}
        if "TANH" in constants:  # the approximate tanh is an NVIDIA instruction
            constants["TANH"] = False
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    if target in ("sm_100", "gfx942"):  # compile_options sets no bound on registers there
        options.pop("maxnreg", None)
    return triton.compile(ASTSource(variant.kernel, variant.signature, constants, aligned), target=gpu, options=options)


def _pixel_variant(
    name: str, kernel: Callable, pointers: dict[str, str], constants: dict[str, object], options: dict[str, object]
) -> Variant:
    """A Variant whose arguments are `pointers` (name: element type), constants, fp32 numbers, and else 64-bit sizes.

    Launches often pass 32-bit sizes; 64 bits need the most registers.
    """

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in pointers:
            return f"*{pointers[argument]}"
        return "fp32" if argument.removesuffix("_low") in _FLOATS else "i64"

    return Variant(name, kernel, {argument: type_of(argument) for argument in kernel.arg_names}, constants, options)


def _accumulator(dtype: str) -> tuple[str, torch.dtype, str]:
    """The dtype a kernel computes in, as Triton and as torch name it, and the inline assembly it uses there."""
    return ("fp64", torch.float64, "plain") if dtype == "fp64" else ("fp32", torch.float32, "ptx")


def _flow_interpolate() -> Iterator[Variant]:
    for channels, dtype in ((1, "bf16"), (3, "bf16"), (3, "fp32"), (3, "fp64"), (8, "fp32"), (16, "bf16")):
        acc, _, _ = _accumulator(dtype)
        pointers = {"x": dtype, "labels": "u8", "t": "fp32", "centroids": acc, "out": dtype}
        layouts = {"X_LAYOUT": VECTOR, "L_LAYOUT": VECTOR, "OUT_LAYOUT": VECTOR}
        constants = {**layouts, "C": channels, "BLOCK": elementwise_block(channels)}
        name, options = f"C={channels} {dtype}", compile_options(4)
        yield _pixel_variant(f"flow_interpolate {name}", flow_interpolate._interpolate, pointers, constants, options)
        pointers = pointers | {"grad": dtype, "grad_source": dtype, "partial": "fp64"}
        constants = constants | {"G_LAYOUT": VECTOR, "NEED_T": True}
        yield _pixel_variant(
            f"flow_interpolate_bwd {name}", flow_interpolate._interpolate_backward, pointers, constants, options
        )


def _distance_correction() -> Iterator[Variant]:
    """The variants that users meet most, and every number of channels for which the launch settings differ."""
    for channels, transform, dtype in (
        *((c, 0, "bf16") for c in (1, 3, 4, 8, 16)), *((3, transform, "fp32") for transform in range(4)), (3, 0, "fp64"),
    ):  # fmt: skip
        acc, torch_acc, assembly = _accumulator(dtype)
        settings = distance_correction.launch_settings(channels, torch_acc, interpreted=False)
        yield _pixel_variant(
            f"distance_correction C={channels} {TRANSFORMS[transform]} {dtype}",
            distance_correction._distance_correction,
            {"x": dtype, "labels": "u8", "centroids": acc, "out": dtype},
            {
                "X_LAYOUT": VECTOR, "L_LAYOUT": VECTOR, "OUT_LAYOUT": VECTOR, "C": channels, "TRANSFORM": transform,
                "UNIT_TEMPERATURE": True, "CAPPED": False, "ASSEMBLY": assembly,
                "RUN": settings.run, "BLOCK": settings.block,
            },
            settings.options,
        )  # fmt: skip


def _flow_loss() -> Iterator[Variant]:
    layouts = {name: VECTOR for name in ("X_LAYOUT", "S_LAYOUT", "L_LAYOUT", "OUT_LAYOUT")}
    for channels, transform, endpoint, dtype in (
        (3, 0, False, "bf16"), (3, 0, True, "bf16"), (3, 0, True, "fp32"), (3, 1, False, "fp32"), (8, 0, True, "bf16"),
        (16, 0, False, "bf16"), (3, 0, False, "fp64"),
    ):  # fmt: skip
        acc, torch_acc, assembly = _accumulator(dtype)
        settings = distance_correction.launch_settings(channels, torch_acc, False, flow_loss._registers(channels))
        pointers = {
            "x": dtype, "source": dtype, "labels": "u8", "t": "fp32", "centroids": acc, "residual": dtype,
            "pixel_losses": acc, "sums": "fp64", "counts": "i32",
        }  # fmt: skip
        constants = {
            **layouts, "C": channels, "ENDPOINT": endpoint, "ENDPOINT_SPACE": endpoint, "CORRECTED": True, "ANNEALED": False,
            "NEED_GRAD": True, "PER_PIXEL": False, "TRANSFORM": transform, "UNIT_TEMPERATURE": True, "CAPPED": False,
            "ASSEMBLY": assembly, "RUN": settings.run, "BLOCK": settings.block,
        }  # fmt: skip
        predicts = "endpoint" if endpoint else "velocity"
        name = f"flow_loss C={channels} {predicts} {transform} {dtype}"
        yield _pixel_variant(name, flow_loss._flow_loss, pointers, constants, settings.options)
    pointers = {"sums": "fp64", "counts": "i32", "loss": "fp32", "count": "i64"}
    constants = {"MEAN": True, "PER_PIXEL": False, "BLOCK": 1024}
    yield _pixel_variant("flow_loss second stage", flow_loss._finish, pointers, constants, compile_options(4))
    for channels, dtype in ((3, "bf16"), (16, "fp32")):
        pointers = {"grad_loss": "fp32", "residual": dtype, "count": "i64", "out": dtype}
        constants = {
            "R_LAYOUT": VECTOR, "G_LAYOUT": VECTOR, "OUT_LAYOUT": VECTOR, "C": channels, "MEAN": True, "PER_PIXEL": False,
            "ACC": tl.float32, "BLOCK": elementwise_block(channels),
        }  # fmt: skip
        name = f"flow_loss_bwd C={channels} {dtype}"
        yield _pixel_variant(name, flow_loss._scale, pointers, constants, compile_options(4))


_TABLES = {
    "cells": "i32", "records": "fp32", "records_left": "i32", "projection": "fp32", "starts": "i32", "members": "i32",
    "rivals": "i32", "certain": "fp32",
}  # fmt: skip


def _decoding(channels: int, tables: str) -> tuple[dict[str, object], bool]:
    """The constants of a kernel that decodes with "grid", with "guesses" or without tables, and whether it has guesses."""
    guesses, grid = tables == "guesses", tables == "grid"
    constants = {
        "X_LAYOUT": VECTOR, "C": channels, "GRID_SIZE": 64 if grid else 0, "AXES": min(channels, 6) if guesses else 0,
        "LOG2_CELLS": 0 if not guesses else 4 if channels == 4 else 3,
        "BLOCK": nearest_centroid.block_of(channels, grid, guesses),
    }  # fmt: skip
    return constants, guesses


def _nearest_centroid() -> Iterator[Variant]:
    for channels, tables, margin, dtype in (
        (3, "grid", False, "bf16"), (3, "grid", False, "fp32"), (3, "grid", True, "bf16"), (3, "", False, "bf16"),
        (3, "", True, "fp32"),
        (3, "", True, "fp64"), (4, "", False, "fp32"), (8, "", False, "bf16"), (16, "", True, "bf16"),
        *((c, "guesses", False, dtype) for c, dtype in ((4, "fp32"), (5, "bf16"), (8, "bf16"), (9, "fp32"), (16, "bf16"))),
    ):  # fmt: skip
        acc, torch_acc, assembly = _accumulator(dtype)
        pointers = {"x": dtype, "centroids": acc, **_TABLES, "labels": "u8", "distance": acc, "margin": acc}
        constants, guesses = _decoding(channels, tables)
        distance = margin or (tables, channels, dtype) in (("grid", 3, "fp32"), ("guesses", 8, "bf16"))
        constants |= {"DISTANCE": distance, "MARGIN": margin, "ASSEMBLY": assembly}
        constants["BLOCK"] = nearest_centroid.block_of(channels, tables == "grid", guesses, margin)
        name = f"nearest_centroid C={channels} {tables + ' ' * bool(tables)}{'margin ' * margin}{dtype}"
        options = nearest_centroid.options_of(torch_acc, guesses)
        yield _pixel_variant(name, nearest_centroid._nearest_centroid, pointers, constants, options)


def _decode_confusion() -> Iterator[Variant]:
    for channels, tables, by_class, dtype in (
        (3, "grid", False, "bf16"), (3, "", False, "fp64"), (8, "", False, "fp32"), (16, "", False, "bf16"),
        (3, "grid", True, "bf16"), (8, "guesses", False, "bf16"), (16, "guesses", True, "bf16"),
    ):  # fmt: skip
        acc, torch_acc, assembly = _accumulator(dtype)
        pointers = {"x": dtype, "target": "u8", "centroids": acc, **_TABLES, "counts": "i64"}
        constants, guesses = _decoding(channels, tables)
        constants |= {"L_LAYOUT": VECTOR, "BY_CLASS": by_class, "ASSEMBLY": assembly}
        options = nearest_centroid.options_of(torch_acc, guesses, registers=128)
        name = f"decode_confusion C={channels} {tables + ' ' * bool(tables)}{'by class ' * by_class}{dtype}"
        yield _pixel_variant(name, decode_confusion._decode_confusion, pointers, constants, options)


def _class_probabilities() -> Iterator[Variant]:
    for channels, transform, form, dtype in (
        (3, 0, 0, "bf16"),
        (8, 0, 0, "fp32"),
        (3, 1, 1, "fp32"),
        (16, 3, 2, "fp64"),
    ):
        acc, torch_acc, assembly = _accumulator(dtype)
        constants = {
            "X_LAYOUT": VECTOR, "C": channels, "TRANSFORM": transform, "FORM": form, "FAST": transform == 0,
            "ASSEMBLY": assembly, "BLOCK": class_probabilities.block_of(channels, torch_acc),
        }  # fmt: skip
        name = f"class_probabilities C={channels} {TRANSFORMS[transform]} {FORMS[form]} {dtype}"
        pointers = {"x": dtype, "centroids": acc, "out": acc}
        yield _pixel_variant(name, class_probabilities._class_probabilities, pointers, constants, compile_options(4))


def _top_classes() -> Iterator[Variant]:
    for channels, entries, transform, dtype in (
        (3, 4, 0, "bf16"), (8, 8, 0, "fp32"), (8, 16, 0, "bf16"), (16, 8, 2, "fp32"), (3, 8, 0, "fp64"),
    ):  # fmt: skip
        acc, torch_acc, assembly = _accumulator(dtype)
        constants = {
            "X_LAYOUT": VECTOR, "C": channels, "N": entries, "TRANSFORM": transform, "FAST": transform == 0,
            "ASSEMBLY": assembly, "BLOCK": top_classes.block_of(channels, entries, torch_acc),
        }  # fmt: skip
        name = f"top_classes C={channels} N={entries} {TRANSFORMS[transform]} {dtype}"
        pointers = {"x": dtype, "centroids": acc, "labels": "u8", "probabilities": acc}
        yield _pixel_variant(name, top_classes._top_classes, pointers, constants, top_classes.options_of(torch_acc))


#: Variants of each per-pixel op, by name.
PIXEL_OPS = {
    "flow_interpolate": _flow_interpolate,
    "distance_correction": _distance_correction,
    "flow_loss": _flow_loss,
    "nearest_centroid": _nearest_centroid,
    "decode_confusion": _decode_confusion,
    "class_probabilities": _class_probabilities,
    "top_classes": _top_classes,
}


def pixel_variants() -> Iterator[Variant]:
    for variants in PIXEL_OPS.values():
        yield from variants()


_FIELD_KERNELS = {
    "forward": field.forward_kernel,
    "states": field.forward_kernel,
    "backward": field.backward_kernel,
    "enter": field.enter_kernel,
    "table": field.table_kernel,
    "finish": field.finish_kernel,
}
#: Arguments of the field's kernels that are fp32 in memory for every operand dtype.
_FIELD_FP32 = ("table", "waves", "inverse_rms", "inverse_lengths", "scratch_sums", "partials", "by_patch", "by_group")
_FIELD_INT32 = (
    "first", "columns", "per_image", "depth", "features", "sums", "patches", "groups_before", "patches_per_group", "freqs",
)  # fmt: skip
_FIELD_STRIDES = ("sb", "sc", "sh", "sw", "gb", "gc", "gh", "gw")
#: Arguments that a launch passes as None.
_FIELD_UNUSED = {
    "forward": ("grad", "states", "later_states", "inverse_rms", "grads", "partials"),
    "states": ("out", "out_bias"),
}


def field_variant(
    kernel: str, dtype: str = "bf16", hidden: int = 64, ratio: int = 2, p: int = 16, channels: int = 3, *, both: bool = True,
    residual: bool = True, precision: str = "ieee", patches: int = 1024, matmul_path: str = "warp_groups",
) -> Variant:  # fmt: skip
    """The variant of a field's kernel that a call on `patches` of one dtype ("fp32", "bf16" or "fp16") launches on NVIDIA GPUs."""
    operand = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    inner = ratio * hidden
    aliased = field_settings.states_fit_in_gradients(hidden, inner, p, operand, operand)
    sizes = field_settings.Sizes(hidden, inner, p, channels, operand, both, residual, precision, matmul_path, aliased)
    tiles = 1
    if kernel in ("forward", "states"):
        tiles = field_settings.tiles_per_program(patches, p * p, field_settings.settings_of(kernel, sizes).rows)
    constants = field_settings.constants(kernel, sizes, tiles)
    constants |= dict.fromkeys(_FIELD_UNUSED.get(kernel, ("later_states",) if kernel == "backward" and aliased else ()))
    if "UPCAST" in constants:
        constants["UPCAST"] = False

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in _FIELD_INT32:
            return "i32"
        if argument in _FIELD_STRIDES:
            return "i64"
        if argument == "eps":
            return "fp32"
        tiled = argument == "grads" and field_settings.tiles_of("backward", sizes) > 1
        return "*fp32" if argument in _FIELD_FP32 or tiled else f"*{dtype}"

    signature = {argument: type_of(argument) for argument in _FIELD_KERNELS[kernel].arg_names}
    name = f"neural_field {kernel} {dtype} Hx={hidden} r={ratio} p={p} C={channels}{' tf32' * (precision == 'tf32')}"
    return Variant(name, _FIELD_KERNELS[kernel], signature, constants, field_settings.options_of(kernel, sizes))


def field_variants(matmul_path: str = "warp_groups") -> Iterator[Variant]:
    for kernel in _FIELD_KERNELS:
        variant = functools.partial(field_variant, kernel, matmul_path=matmul_path)
        yield variant()
        yield variant("bf16", 32, 4, 8)
        yield variant("fp16", 128, 4, 32, 16)
        yield variant("bf16", 16, 1, 4, 1, both=False, residual=False)
        yield variant("fp32")
        yield variant("fp32", precision="tf32")
        yield variant("fp32", 128, 1)
    yield field_variant("backward", hidden=128, matmul_path=matmul_path)
    yield field_variant("backward", "fp16", matmul_path=matmul_path)
    yield field_variant("backward", ratio=4, residual=False, matmul_path=matmul_path)


def every_variant() -> Iterator[Variant]:
    yield from pixel_variants()
    yield from field_variants()
