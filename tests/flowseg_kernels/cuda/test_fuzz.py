"""The short run of the fuzzer on the emulated CUDA kernels."""

from ...fuzz.test_fuzz import slow, test_any_call_is_within_its_bound_of_fp64, test_what_failed_once  # noqa: F401
