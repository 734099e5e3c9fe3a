"""Every op's host code up to the launch of its Triton kernels, for sm_90 and without a GPU (pretended_gpu.py explains how).

By default a sample of the calls runs that has every option; `--every-variant` runs all calls (2 minutes). To test another Triton,
such as that of a GPU machine's torch, use an environment with torch, numpy, pytest and pytest-benchmark:
`OTHER/bin/python -m pytest --every-variant tests/flowseg_kernels/static/test_triton_launch.py`.
"""

import functools
import importlib.util
import itertools
import math
import types
from typing import NamedTuple

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.triton import INTERPRETED, compile_options, over_blocks

from ...support.samples import image_batch, layouts
from . import sass

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRETED:
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so host code selects the kernel variants of that GPU", allow_module_level=True)

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from flowseg_kernels.ops.distance_correction import triton_kernels as distance_correction

from ...support import aot
from . import pretended_gpu
from .pretended_gpu import SHARED_MEMORY, TARGET, launches

#: Registers of a multiprocessor; most bytes that a thread may spill.
REGISTERS, SPILLED = 65536, 64
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
INTEGERS = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}


class Call(NamedTuple):
    """A call of an op, and the kernels it launches in order. images, pixels: their numbers, if programs take blocks of pixels."""

    run: functools.partial
    kernels: list[str]
    images: int = 0
    pixels: int = 0


@functools.cache
def codebook(channels):
    return fk.Codebook(fk.kronecker_centroids(150, channels))


def inputs(dtype="bf16", channels=3, size=(2, 32, 32), layout="contiguous", labels="uint8"):
    """Arguments of the per-pixel ops, by name."""
    codes = codebook(channels)
    x, source, y, t = image_batch(codes.centroids, *size, dtype=FLOATS[dtype])
    x, source, y = (dict(layouts(v))[layout] for v in (x, source, y.to(INTEGERS[labels])))
    return types.SimpleNamespace(x=x, source=source, labels=y, t=t.float(), codes=codes)


def interpolate(image, need_t=True, one_time=False):
    v = inputs(**image)
    t = v.t[:1].expand(len(v.t)) if one_time else v.t.requires_grad_(need_t)
    # x has the image's layout, so the gradient has it too.
    fk.flow_interpolate(v.source.requires_grad_(), v.labels, t, v.codes).backward(v.x)


def correct(image, ignore_index=None, **options):
    v = inputs(**image)
    fk.distance_correction(v.x, v.labels, v.codes, ignore_index=ignore_index, **options)


def lose(image, need_grad=True, **options):
    v = inputs(**image)
    loss = fk.flow_loss(v.x.requires_grad_(need_grad), v.source, v.labels, v.t, v.codes, **options)
    if need_grad:
        # Not 1: then the residual already is the gradient. Expanded, like the gradient of a sum.
        loss.backward(torch.full((), 2.0, dtype=loss.dtype).expand(loss.shape))


def decode(image, bare=False, out="int64", **options):
    v = inputs(**image)
    fk.nearest_centroid(v.x, v.codes.centroids if bare else v.codes, out_dtype=INTEGERS[out], **options)


def count(image, bare=False, ignore_index=None):
    v = inputs(**image)
    fk.decode_confusion(v.x, v.labels, v.codes.centroids if bare else v.codes, ignore_index=ignore_index)


def probabilities(image, **options):
    v = inputs(**image)
    fk.class_probabilities(v.x, v.codes, **options)


def top(image, k=2, out="int64", **options):
    v = inputs(**image)
    fk.top_classes(v.x, v.codes, k, out_dtype=INTEGERS[out], **options)


def field(
    dtype="bf16", shape=(1, 3, 32, 32), p=16, hidden=64, ratio=2, depth=2, normalise="both", form="residual",
    shared=None, layout="contiguous", needs=range(8), autocast=False, precision="none",
):  # fmt: skip
    """shared: dtype of the tensors that patches share; needs: positions of the arguments that require a gradient."""
    batch, channels, height, width = shape
    weights = (batch, height * width // p**2, depth, 2 * ratio * hidden * hidden)
    sizes = (weights, (hidden, channels + 64), (hidden,), (depth, hidden), (hidden,), (channels, hidden), (channels,))
    dtypes = (FLOATS[dtype], *[FLOATS[shared or dtype]] * 6)
    tensors = [dict(layouts(torch.zeros(shape, dtype=FLOATS[dtype])))[layout]]
    tensors += [torch.zeros(size, dtype=each) for size, each in zip(sizes, dtypes)]
    for i in needs:
        tensors[i].requires_grad_()
    if form == "plain":
        tensors[4:6] = None, None
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = fk.neural_field(*tensors, patch_size=p, mlp_ratio=ratio, normalise=normalise, form=form)
        if needs:
            out.backward(torch.zeros(width, dtype=out.dtype).expand(out.shape))
    finally:
        matmul.fp32_precision = before


IMAGES = [
    {},
    {"dtype": "fp16", "size": (1, 1, 1), "labels": "int32"},
    {"dtype": "fp32", "size": (2, 9, 13), "labels": "int64"},
    {"dtype": "fp64", "layout": "channels_last", "labels": "int16"},
    {"dtype": "bf16", "layout": "channels_last", "size": (3, 17, 1)},
    {"dtype": "bf16", "layout": "every_second", "channels": 8, "labels": "int64"},
    {"dtype": "fp16", "layout": "offset_by_one", "channels": 4, "labels": "int32"},
    {"dtype": "fp32", "layout": "transposed", "channels": 16},
    {"dtype": "fp16", "layout": "reversed_dims", "channels": 1, "labels": "int16"},
    {"dtype": "fp32", "layout": "every_second", "size": (1, 1, 17), "labels": "int64"},
]
#: Images without pixels.
EMPTY = [{"size": (0, 32, 32)}, {"size": (2, 0, 32)}]


def per_pixel(run, kernels, images=IMAGES, options=({},)):
    """Yield a Call of each option on each image. kernels: names, or a function from the option to names."""
    for image, option in itertools.product(images, options):
        batch, height, width = image.get("size", (2, 32, 32))
        found = kernels(option) if callable(kernels) else kernels
        yield Call(functools.partial(run, image, **option), found, batch, height * width)


def every(**options):
    """Return every combination of the options' values."""
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


def losses(option):
    return ["_flow_loss", "_finish", *(["_scale"] if option.get("need_grad", True) else [])]


def fields(options):
    """Yield a Call of the field per option."""
    for option in options:
        patches, needs = option.get("shape", (1,))[0], option.get("needs", range(8))
        round_ = ["forward_kernel", *(["backward_kernel"] if option.get("depth", 2) else []), "enter_kernel"]
        kernels = ["table_kernel", "forward_kernel"] if patches else []
        kernels += ["table_kernel", *(round_ if patches else []), "finish_kernel"] if needs else []
        yield Call(functools.partial(field, **option), kernels)


#: By op: n and its calls. One call in n runs by default.
GROUPS = {
    "flow_interpolate": (2, per_pixel(interpolate, ["_interpolate", "_interpolate_backward"])),
    "flow_interpolate, options": (
        1, per_pixel(interpolate, ["_interpolate", "_interpolate_backward"], [{}], [{"need_t": False}, {"one_time": True}]),
    ),
    "distance_correction": (2, per_pixel(correct, ["_distance_correction"])),
    "distance_correction, options": (
        5,
        per_pixel(
            correct, ["_distance_correction"], [{}],
            every(transform=("neg_log", "neg_sq", "neg_dist", "inverse"), temperature=(1.0, 0.3), max_norm=(None, 2.0),
                  ignore_index=(None, -1)),
        ),
    ),
    "flow_loss": (3, per_pixel(lose, losses)),
    "flow_loss, options": (
        13,
        per_pixel(
            lose, losses, [{}],
            every(predicts=("velocity", "endpoint"), loss_space=("velocity", "endpoint"), correction_weight=(0.0, 0.5),
                  need_grad=(True, False), schedule=("static", "annealed"), reduction=("mean", "sum", "none")),
        ),
    ),
    "nearest_centroid": (1, per_pixel(decode, ["_nearest_centroid"])),
    "nearest_centroid, options": (
        3,
        per_pixel(
            decode, ["_nearest_centroid"], [{}],
            every(bare=(False, True), return_distance=(False, True), return_margin=(False, True), out=INTEGERS),
        ),
    ),
    "decode_confusion": (2, per_pixel(count, ["_decode_confusion"])),
    "decode_confusion, options": (
        1, per_pixel(count, ["_decode_confusion"], [{"labels": "int64"}], every(bare=(False, True), ignore_index=(None, -1))),
    ),
    "class_probabilities": (2, per_pixel(probabilities, ["_class_probabilities"])),
    "class_probabilities, options": (
        5,
        per_pixel(
            probabilities, ["_class_probabilities"], [{}],
            every(transform=("neg_log", "neg_sq", "neg_dist", "inverse"), temperature=(1.0, 0.3),
                  form=("probabilities", "log_probabilities", "logits")),
        ),
    ),
    "top_classes": (2, per_pixel(top, ["_top_classes"])),
    "top_classes, options": (
        5,
        per_pixel(
            top, ["_top_classes"], [{}],
            every(transform=("neg_log", "neg_sq", "neg_dist", "inverse"), temperature=(1.0, 0.3), k=(1, 5, 16), out=("uint8",)),
        ),
    ),
    "empty images": (
        1,
        itertools.chain(
            *(per_pixel(run, [], EMPTY) for run in (interpolate, correct, decode, count, probabilities, top)),
            per_pixel(lose, ["_finish"], EMPTY),
        ),
    ),
    "neural_field": (
        7,
        fields([
            *every(dtype=("bf16", "fp32", "fp16"), normalise=("both", "first"), form=("residual", "plain"), depth=(2, 4)),
            {"dtype": "bf16", "hidden": 128},
            {"dtype": "fp32", "hidden": 128, "ratio": 1},
            {"dtype": "fp16", "p": 32, "hidden": 128, "ratio": 4, "depth": 1, "shape": (1, 16, 32, 32)},
        ]),
    ),
    "neural_field, options": (
        1,
        fields([
            {"depth": 0, "layout": "channels_last"},
            {"dtype": "fp32", "autocast": True, "needs": (0,)},
            {"shared": "fp32", "autocast": True, "needs": (1, 2, 6, 7)},
            {"dtype": "fp32", "precision": "tf32", "needs": ()},
            {"p": 4, "hidden": 16, "ratio": 1, "depth": 1, "shape": (2, 1, 4, 4), "layout": "offset_by_one"},
            {"p": 3, "hidden": 7, "ratio": 3, "shape": (1, 2, 3, 6), "layout": "every_second", "shared": "fp32"},
            {"p": 2, "hidden": 16, "shape": (1, 3, 4, 600), "depth": 1},
            {"shape": (1, 3, 512, 512), "depth": 1, "needs": ()},
            {"p": 2, "hidden": 16, "depth": 3, "shape": (1, 3, 4, 12), "dtype": "fp32", "shared": "bf16"},
            {"shape": (0, 3, 32, 32)},
        ]),
    ),
}  # fmt: skip
CALLS = {name: (one_in, list(calls)) for name, (one_in, calls) in GROUPS.items()}


def pytest_generate_tests(metafunc):
    if "call" in metafunc.fixturenames:
        step = {name: 1 if metafunc.config.getoption("--every-variant") else n for name, (n, _) in CALLS.items()}
        named = [
            (f"{name} {i}", c) for name, (_, calls) in CALLS.items() for i, c in enumerate(calls) if i % step[name] == 0
        ]
        metafunc.parametrize("call", [c for _, c in named], ids=[name for name, _ in named])


@functools.cache
def resources(cubin):
    (used,) = sass.resources(cubin).values()
    return used


def assert_spills_little(launch):
    """A kernel spills a few words at most, none in an innermost loop.

    test_triton.py and test_field_variants.py check that common variants spill nothing.
    """
    used = resources(launch.cubin)
    assert used["STACK"] + used["LOCAL"] <= SPILLED, f"{launch.kernel}: {used}"
    if used["STACK"] + used["LOCAL"]:
        (code,) = sass.disassemble(launch.cubin).values()
        assert not any({"STL", "LDL"} & set(loop.opcodes()) for loop in sass.innermost_loops(code)), launch.kernel


def assert_fits(launch):
    assert launch.metadata.target == TARGET and launch.cubin.startswith(b"\x7fELF")
    assert launch.metadata.shared <= SHARED_MEMORY
    assert resources(launch.cubin)["REG"] * 32 * launch.metadata.num_warps <= REGISTERS
    assert all(isinstance(n, int) and n > 0 for n in launch.grid) and launch.grid[1:] == (1, 1)
    assert_spills_little(launch)


def test_launches(call):
    with launches() as found:
        call.run()
    assert [launch.kernel for launch in found] == call.kernels
    for launch in found:
        assert_fits(launch)
        if call.pixels and launch.kernel != "_finish":
            assert launch.grid[0] == call.images * math.ceil(call.pixels / launch.arguments["BLOCK"])


def test_every_kernel_is_launched():
    """The default sample of calls launches every kernel."""
    launched = {kernel for one_in, calls in CALLS.values() for call in calls[::one_in] for kernel in call.kernels}
    assert launched == {variant.kernel.__name__ for variant in aot.every_variant()}


def _without_last_stride(*args, **inputs):
    programs, sizes, layouts = over_blocks(*args, **inputs)
    return programs, sizes[:-1], layouts


def _without_layouts(*args, **inputs):
    return *over_blocks(*args, **inputs)[:2], {}


@pytest.mark.parametrize(
    "name, wrong, error",
    [
        ("over_blocks", _without_last_stride, TypeError),
        ("over_blocks", _without_layouts, TypeError),
        ("two_floats", lambda value: ("1", "0"), TypeError),
        ("compile_options", lambda *args: compile_options(2) | {"warps": 2}, KeyError),
        ("aligned", lambda codes: None, CompilationError),
        ("aligned", lambda codes: codes.long(), CompilationError),
    ],
)  # fmt: skip
def test_a_wrong_launch_is_an_error(name, wrong, error, monkeypatch):
    monkeypatch.setattr(distance_correction, name, wrong)
    with launches() as found, pytest.raises(error):
        correct({})
    assert not found


def test_a_variant_that_spills_is_an_error(monkeypatch):
    monkeypatch.setattr(distance_correction, "compile_options", lambda *args: compile_options(2, registers=24))
    with launches() as found:
        correct({})
    with pytest.raises(AssertionError, match="_distance_correction"):
        assert_fits(found[0])


def test_too_much_shared_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(pretended_gpu, "SHARED_MEMORY", 8192)
    monkeypatch.setattr(pretended_gpu, "DEVICE", "a smaller one")
    with launches() as found, pytest.raises(OutOfResources, match="shared memory"):
        field()
    assert [launch.kernel for launch in found] == ["table_kernel"]
