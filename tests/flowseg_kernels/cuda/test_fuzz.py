"""The short run of the fuzzer on the emulated CUDA kernels."""

from ...fuzz.test_fuzz import (  # noqa: F401
    slow,
    test_any_call_is_within_its_bound_of_fp64,
    test_any_call_on_a_changed_codebook_is_right_or_an_error,
    test_what_failed_once,
)
