"""Random calls of every op as hypothesis strategies: tiny tensors, every memory layout, every option, special values.

A case holds choices, not tensors, so the line that hypothesis prints can be pasted into a test. `tensors` in inputs.py makes the
values from the seed of the case.
"""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("uint8", "int16", "int32", "int64")
LAYOUTS = (
    "contiguous", "channels_last", "transposed", "every_second", "offset_1", "offset_3", "reversed_dims",
    "expanded_0", "expanded_1", "expanded_2", "expanded_3", "expanded_all",
)  # fmt: skip
CODES = ("kronecker", "r_sequence", "grid", "lattice", "doubled", "large", "small", "shifted", "fp64")
#: Special values; code, between and near_code replace all channels of a pixel; the others replace one.
SPECIALS = (
    "nan", "inf", "-inf", "1e38", "-1e38", "3e19", "1e15", "1e-40", "1e-30", "-0.0", "code", "between", "near_code", "border",
)  # fmt: skip
#: Changes to the tensors of a codebook before the call. Changes in INVALID leave no valid codes: the call must raise an error.
CHANGES = (
    "moved",
    "shuffled",
    "filled",
    "replaced",
    "averaged",
    "bfloat16",
    "float16",
    "grid",
    "nan",
    "inf",
    "integers",
    "flat",
    "none",
    "meta",
)
INVALID = ("nan", "inf", "integers", "flat", "none", "meta")
TRANSFORMS = ("neg_log", "neg_sq", "neg_dist", "inverse")
#: eps. `pixels` raises it to 1e-6 for `inverse`.
EPS = (None, 0.1, 1e-2, 1e-3, 1.0, 1e-6, 1e-14, 1e-30)


class _Brief:
    """Its repr is the call that creates it, without arguments at their defaults."""

    def __repr__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(type(self)(), f.name)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(repr(self))


@dataclasses.dataclass(frozen=True, repr=False)
class Pixels(_Brief):
    """A call of a per-pixel op."""

    batch: int = 1
    height: int = 1
    width: int = 1
    channels: int = 3
    classes: int = 2
    codes: str = "kronecker"
    bare: bool = False
    grid: bool = False
    dtype: str = "float32"
    source_dtype: str = "float32"
    time_dtype: str = "float32"
    label_dtype: str = "int64"
    ignore: int = 255
    ignored: float = 0.1
    bad_label: int | None = None
    times: str = "random"
    #: layouts of image, source, labels and gradient
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4
    exact: bool = False
    spread: float = 0.3
    magnitude: float = 1.0
    specials: tuple[tuple[str, int, str], ...] = ()
    seed: int = 0
    change: str | None = None
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, repr=False)
class Field(_Brief):
    """A call of neural_field."""

    batch: int = 1
    down: int = 1
    across: int = 1
    channels: int = 3
    hidden: int = 8
    depth: int = 1
    ratio: int = 1
    patch: int = 2
    freqs: int = 2
    dtypes: tuple[str, str, str] = ("float32",) * 3  # x, weights, the rest
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # x, weights, gradient
    needs: int = 255  # bit i: the i-th of the eight tensors requires a gradient
    scale: float = 1.0
    normalise: str = "both"
    form: str = "residual"
    seed: int = 0


@st.composite
def sizes(draw, most: int):
    """Height and width: 0, 1, primes, and numbers next to the sizes of a vector, a block and a pixel chunk."""
    if draw(st.integers(0, 19)) == 0:
        long = [n for n in (63, 64, 65, 255, 256, 257, 511, 513, 1024, 1031, 4095, 4097, 8209) if n <= most]
        height, width = 1, draw(st.sampled_from(long))
        return (height, width) if draw(st.booleans()) else (width, height)
    return draw(st.sampled_from((1, 2, 3, 5, 7, 4, 8, 11, 0))), draw(
        st.sampled_from((1, 3, 5, 7, 13, 16, 17, 23, 2, 31, 0))
    )


def formula_options(pick, op: str) -> dict:
    """Options of the formula that an op computes; {} for an op without any."""
    options: dict = {}
    if op in ("distance_correction", "flow_loss"):
        options = {
            "temperature": pick(1.0, 1.0, 1.0, 0.5, 2.0, 1.3),
            "eps": pick(*EPS),
            "transform": pick("neg_log", *TRANSFORMS),
            "max_norm": pick(None, None, 0.01, 0.5, 30.0),
        }
        if options["transform"] == "inverse" and options["eps"] is not None:
            options["eps"] = max(options["eps"], 1e-6)
        if op == "flow_loss" and options["eps"] is not None:
            # x_t itself is rounded. With eps far below that rounding no result could be called wrong.
            options["eps"] = max(options["eps"], 1e-3)
    if op == "flow_loss":
        options |= {
            "predicts": pick("velocity", "endpoint"),
            "loss_space": pick(None, "velocity", "endpoint"),
            "correction_weight": pick(1.0, 0.0, 0.7, 3.0),
            "schedule": pick("static", "annealed"),
            "reduction": pick("mean", "sum", "none"),
            "t_min": pick(0.05, 1e-3, 0.5),
        }
    if op in ("class_probabilities", "top_classes"):
        options = {
            "temperature": pick(1.0, 1.0, 1.0, 0.5, 2.0, 1.3),
            "eps": pick(*EPS),
            "transform": pick("neg_log", *TRANSFORMS),
        }
        if options["transform"] == "inverse":
            options["eps"] = max(options["eps"] or 0.1, 1e-3)
    if op == "class_probabilities":
        options["form"] = pick("probabilities", "log_probabilities", "logits")
    if op == "top_classes":
        options["k"] = pick(1, 2, 3, 4, 5, 8, 9, 16)
    return options


@st.composite
def pixels(draw, op: str, *, slow: bool = False):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    height, width = draw(sizes(300 if slow else 9000))
    # Interpreted kernels take a millisecond per class.
    classes = pick(1, 2, 3, 5, 7, 9, 8, 17) if slow else pick(2, 3, 5, 1, 7, 8, 19, 31, 32, 33, 65, 150, 256, 257)
    if slow and draw(st.integers(0, 29)) == 0:
        classes = pick(33, 40, 65)
    label_dtype = pick(*reversed(INTEGERS))
    if classes > 256 and label_dtype == "uint8":
        label_dtype = "int16"
    dtype = pick(*FLOATS)
    options = formula_options(pick, op)
    if op == "nearest_centroid":
        options = {
            "out_dtype": label_dtype,
            "return_distance": draw(st.booleans()),
            "return_margin": draw(st.booleans()),
        }
    ignores = (255, -1, 0, classes - 1, 7, 100000) if label_dtype in ("int32", "int64") else (255, -1, 0, classes - 1)
    ignore = pick(*ignores)
    if op == "nearest_centroid" and (classes > 255 or ignore < 0) and label_dtype == "uint8":
        ignore = 255
        if classes > 256:
            options["out_dtype"] = "int16"
    batch = pick(1, 1, 2, 3, 0) if not slow else pick(1, 1, 1, 2, 0)
    channels = pick(3, 3, 3, 1, 2, 4, 5, 8, 7, 11, 16)
    if batch * height * width * channels * classes > 60_000:
        batch, classes = min(batch, 1), min(classes, 5)
    return Pixels(
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        classes=classes,
        grid=op in ("nearest_centroid", "decode_confusion"),
        codes=pick(*CODES),
        bare=draw(st.booleans()),
        dtype=dtype,
        source_dtype=pick(dtype, dtype, *FLOATS),
        time_dtype=pick("float32", *FLOATS),
        label_dtype=label_dtype,
        ignore=ignore,
        ignored=pick(0.1, 0.0, 0.9, 1.0),
        bad_label=pick(*(None,) * 18, classes, -3),
        times=pick("random", "random", "ends", "near_one"),
        layouts=tuple(pick("contiguous", *LAYOUTS) for _ in range(4)),
        exact=pick(False, False, True),
        spread=pick(0.3, 1e-2, 1.0, 1e-4, 0.0),
        magnitude=pick(1.0, 1.0, 1.0, 1.0, 30.0, 1e4, 1e-3),
        specials=tuple(
            (pick("image", "image", "source"), draw(st.integers(0, 997)), pick(*SPECIALS))
            for _ in range(pick(0, 0, 1, 2, 5))
        ),
        seed=draw(st.integers(0, 2**31 - 1)),
        options=options,
    )


@st.composite
def fields(draw, *, slow: bool = False, cuda: bool = False):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    # The kernels in CUDA C++ pass most other calls on.
    dtype = (
        pick("bfloat16", "float16", "bfloat16", "float32")
        if cuda
        else pick("float32", "bfloat16", "float16", "float64")
    )
    return Field(
        batch=pick(1, 1, 2, 0),
        down=pick(1, 1, 2, 0),
        across=pick(1, 2, 3) if not slow else pick(1, 1, 2),
        channels=pick(3, 1, 2, 5, 8, 16),
        hidden=pick(8, 16, 64, 24, 40, 12) if cuda else pick(8, 4, 7, 16, 24, 33) if not slow else pick(8, 4, 7, 16),
        depth=pick(1, 2, 3, 0) if not slow else pick(1, 1, 2, 0),
        ratio=pick(1, 2, 3),
        patch=pick(2, 1, 3, 4, 9) if cuda else pick(2, 1, 3, 4, 5),
        freqs=pick(2, 1, 3),
        dtypes=(dtype,) * 3 if draw(st.integers(0, 4)) else tuple(pick(*FLOATS) for _ in range(3)),
        layouts=tuple(pick("contiguous", *LAYOUTS) for _ in range(3)),
        needs=pick(255, 255, draw(st.integers(0, 255))),
        scale=pick(1.0, 1.0, 0.1, 10.0, 0.0, 1e-4, 1e3),
        normalise=pick("both", "first"),
        form=pick("residual", "plain"),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def with_changed_codebook(case: Pixels) -> Pixels:
    """The same case on a changed codebook; the seed selects the change."""
    return dataclasses.replace(case, bare=False, change=CHANGES[case.seed % len(CHANGES)])


PIXEL_OPS = (
    "flow_interpolate",
    "distance_correction",
    "flow_loss",
    "nearest_centroid",
    "decode_confusion",
    "class_probabilities",
    "top_classes",
)


def cases(op: str, *, slow: bool = False, cuda: bool = False):
    return fields(slow=slow, cuda=cuda) if op == "neural_field" else pixels(op, slow=slow)
