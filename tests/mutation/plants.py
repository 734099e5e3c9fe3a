"""Ten typical kernel bugs, each planted in one of our kernels, with the tests that must see it."""

from __future__ import annotations

import dataclasses
import pathlib

OPS = "tests/flowseg_kernels/ops"


@dataclasses.dataclass(frozen=True)
class Plant:
    """One bug.

    path:     the file that is changed.
    edits:    (old, new) texts; the file contains each old text exactly once.
    language: "C++", "CUDA", "Triton" or "Python": decides what is rebuilt and how the tests run.
    tests:    arguments of pytest: the smallest part of the suite that tests the changed code.
    """

    bug: str
    path: str
    edits: tuple[tuple[str, str], ...]
    language: str
    tests: tuple[str, ...]

    def apply(self, root: pathlib.Path) -> str:
        """Plant the bug in the tree `root`. Returns the old text of the file. ValueError if the edits no longer match it."""
        file = root / self.path
        before = text = file.read_text()
        for old, new in self.edits:
            if text.count(old) != 1 or old == new:
                raise ValueError(f"{self.bug}: wanted {old!r} once in {self.path}; it is there {text.count(old)} times")
            text = text.replace(old, new)
        file.write_text(text)
        return before


PLANTS = (
    Plant(
        "off-by-one tail",
        "flowseg_kernels/ops/nearest_centroid/triton_kernels.py",
        (("for k in range(whole, classes):", "for k in range(whole, classes - 1):"),),
        "Triton",
        (f"{OPS}/test_nearest_centroid.py", "-k", "brute_force or one_class"),
    ),
    Plant(
        "int32 index",
        "csrc/cpu/pixel/blocks.h",
        (("+ p.image * labels.stride[0];", "+ static_cast<int32_t>(p.image * labels.stride[0]);"),),
        "C++",
        (f"{OPS}/test_offsets.py",),
    ),
    Plant(
        "swapped stride",
        "flowseg_kernels/ops/triton_pixels.py",
        (
            (
                "return (p // width) * stride_h + (p % width) * stride_w",
                "return (p // width) * stride_w + (p % width) * stride_h",
            ),
        ),
        "Triton",
        (f"{OPS}/test_flow_interpolate.py", "-k", "strides"),
    ),
    Plant(
        "missing mask",
        "flowseg_kernels/ops/triton_pixels.py",
        (("valid = inside & (label >= 0)", "valid = (label >= 0)"),),
        "Triton",
        (f"{OPS}/test_flow_loss.py", "-k", "reductions_agree or all_ignored"),
    ),
    Plant(
        "wrong eps place",
        "csrc/shared/correction.h",
        (("const V root = square_root(d + eps);", "const V root = square_root(d) + eps;"),),
        "C++",
        (f"{OPS}/test_distance_correction.py", "-k", "gradient_of_the_potential and neg_dist"),
    ),
    Plant(
        "missing max subtraction",
        "flowseg_kernels/ops/distance_correction/triton_kernels.py",
        (
            ("_exponential(own_logit - largest, TRANSFORM)", "_exponential(own_logit, TRANSFORM)"),
            ("_exponential(logit - largest, TRANSFORM)", "_exponential(logit, TRANSFORM)"),
        ),
        "Triton",
        (f"{OPS}/test_distance_correction.py", "-k", "far_points or half_precision"),
    ),
    Plant(
        "unreduced ignore mask",
        "csrc/cuda/flow_loss.cuh",
        (("count += y.at[p] >= 0;", "count += 1;"),),
        "CUDA",
        (
            "-p",
            "tests.host_cuda.plugin",
            f"{OPS}/test_flow_loss.py",
            "-k",
            "reductions_agree or all_ignored or another_dtype",
        ),
    ),
    Plant(
        "tie order",
        "csrc/cpu/pixel/search.h",
        (("const I closer = d < best[u];", "const I closer = d <= best[u];"),),
        "C++",
        (f"{OPS}/test_nearest_centroid.py", "-k", "ties or one_class"),
    ),
    Plant(
        "lost normalisation",
        "csrc/cpu/field/layers.h",
        (
            (
                "      reciprocal_lengths(second, a.hidden);\n",
                "      for (int64_t i = 0; i < a.hidden; ++i) second[i] = 1;\n",
            ),
        ),
        "C++",
        (f"{OPS}/test_neural_field.py", "-k", "odd_sizes or twice_plain"),
    ),
    Plant(
        "stale backend in backward",
        "flowseg_kernels/ops/flow_loss/op.py",
        (
            (
                "count, prediction, ctx.reduction, ctx.backend)",
                "count, prediction, ctx.reduction, requested_backend())",
            ),
        ),
        "Python",
        ("tests/flowseg_kernels/test_contract.py", "-k", "backend_of_its_forward"),
    ),
)
