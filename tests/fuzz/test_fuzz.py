"""A short run of the fuzzer on each backend, and every case that once failed. The long run: python -m tests.fuzz."""

import dataclasses

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flowseg_kernels.runtime.triton import INTERPRETED

from .cases import CHANGES, PIXEL_OPS, Field, Pixels, cases
from .checks import Wrong, agree, check
from .exact import Answer

#: Cases that failed once: (op, case, what was wrong).
FOUND = [
    (
        "distance_correction",
        Pixels(height=63, options={"temperature": 1.0, "eps": None, "transform": "neg_sq", "max_norm": None}),
        "the reference computed 1 - p_y by subtraction: 2 % error next to a code",
    ),
    (
        "neural_field",
        Field(down=0, layouts=("contiguous", "every_second", "contiguous")),
        "the C++ kernel refused strided weights without elements",
    ),
    (
        "neural_field",
        Field(dtypes=("float16",) * 3, scale=0.0),
        "zero weights in fp16: Triton computed infinity times zero for the gradient of x",
    ),
    (
        "flow_loss",
        Pixels(
            height=63,
            channels=7,
            specials=(("image", 0, "3e19"),),
            options={
                "temperature": 1.0,
                "eps": None,
                "transform": "neg_log",
                "max_norm": None,
                "predicts": "velocity",
                "loss_space": None,
                "correction_weight": 1.0,
                "schedule": "static",
                "reduction": "mean",
                "t_min": 0.05,
            },
        ),
        "the bound ignored that a sum of squares over channels overflows although the mean does not",
    ),
    (
        "neural_field",
        Field(depth=2, dtypes=("float16",) * 3, scale=1e3, normalise="first", form="plain"),
        "the bound ignored states beyond the range of fp16",
    ),
    (
        "neural_field",
        Field(depth=2, dtypes=("float16",) * 3, scale=1e-4, normalise="first", form="plain"),
        "the bound ignored states below the normal range of fp16",
    ),
    (
        "neural_field",
        Field(
            dtypes=("bfloat16", "bfloat16", "float32"),
            layouts=("contiguous", "expanded_3", "contiguous"),
            scale=1e3,
            normalise="first",
        ),
        "the bound ignored that a gradient almost cancels for equal generated weights",
    ),
    (
        "neural_field",
        Field(
            depth=2,
            dtypes=("bfloat16",) * 3,
            layouts=("contiguous", "expanded_3", "contiguous"),
            scale=1e3,
            normalise="first",
            form="plain",
            seed=1,
        ),
        "large z in the plain form: the derivative of SiLU with Triton's approximate tanh in bf16 had no bound",
    ),
    (
        "flow_interpolate",
        Pixels(height=63, classes=1, source_dtype="bfloat16", ignored=0.9, specials=(("source", 0, "1e-40"),)),
        "Triton's interpreter lost subnormal bf16 numbers in a conversion",
    ),
    (
        "distance_correction",
        Pixels(
            height=63,
            specials=(("image", 0, "inf"),),
            options={"temperature": 1.0, "eps": None, "transform": "inverse", "max_norm": None},
        ),
        "the reference left zeros in the other channels of a pixel with one infinite channel",
    ),
]


@pytest.fixture
def slow(backend):
    return backend == "triton" and INTERPRETED


@pytest.mark.parametrize("op", [*PIXEL_OPS, "neural_field"])
def test_any_call_is_within_its_bound_of_fp64(backend, slow, op):
    most = 12 if slow else 40 if backend == "cuda" else 120

    @settings(
        max_examples=most, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(cases(op, slow=slow, cuda=backend == "cuda"))
    def every_case(case):
        check(op, case, backend)

    every_case()


@pytest.mark.parametrize("op", PIXEL_OPS)
def test_any_call_on_a_changed_codebook_is_right_or_an_error(backend, slow, op):
    most = 14 if slow or backend == "cuda" else 42

    @settings(
        max_examples=most, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(cases(op, slow=slow), st.sampled_from(CHANGES))
    def every_case(case, change):
        check(op, dataclasses.replace(case, bare=False, change=change), backend)

    every_case()


@pytest.mark.parametrize("op, case", [(op, case) for op, case, _ in FOUND], ids=[why for _, _, why in FOUND])
def test_what_failed_once(backend, slow, op, case):
    check(op, case, backend)


def test_a_wrong_result_is_found():
    """One number outside its bound, NaN instead of a number, and a number instead of NaN."""
    import torch

    want = torch.tensor([1.0, 2.0, float("nan")], dtype=torch.float64)
    answer = Answer(want, torch.full_like(want, 1e-6), torch.zeros(3, dtype=torch.bool))
    agree("same", want.float(), answer)
    for place, value in ((0, 1.00001), (1, float("nan")), (1, float("inf")), (2, 0.0)):
        wrong = want.float().clone()
        wrong[place] = value
        with pytest.raises(Wrong, match="1 of 3 are wrong"):
            agree("changed", wrong, answer)


def test_long_images_are_among_the_cases():
    found = set()

    @settings(max_examples=300, derandomize=True, database=None, phases=(Phase.generate,), deadline=None)
    @given(st.data())
    def collect(data):
        case = data.draw(cases("flow_loss"))
        found.add(case.height * case.width)

    collect()
    assert 0 in found and 1 in found and max(found) > 256
