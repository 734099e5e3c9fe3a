"""Builds the C++ kernels apart from the installed ones: with a sanitizer, with counters, or from a changed copy of the tree.

As a pytest plugin (-p tests.native) it makes the tests use the library that FLOWSEG_TEST_LIBRARY names.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = "libflowseg_cpu.so"

sys.path.insert(0, str(ROOT / "build_backend"))

import flowseg_libraries  # noqa: E402


def build(
    folder: pathlib.Path, flags: str = "", link: str = "", *, root: pathlib.Path = ROOT, sets: bool = True
) -> pathlib.Path:
    """Compile the C++ kernels of `root` into `folder`; a later call compiles only what changed.

    Args:
        flags, link: more flags for the compiler and the linker.
        sets: False to compile for the baseline instruction set only, in a third of the time.
    """
    sets = {} if sets else {"instruction_sets": False}
    with mock.patch.dict(os.environ, {"FLOWSEG_CXXFLAGS": flags, "FLOWSEG_LDFLAGS": link}):
        flowseg_libraries.build_cpu(folder, folder / "objects", root=root, **sets)
    return folder / LIBRARY


def use_named_library() -> None:
    """Use the library that FLOWSEG_TEST_LIBRARY names instead of the installed one."""
    path = os.environ.get("FLOWSEG_TEST_LIBRARY")
    if path:
        from flowseg_kernels.runtime import extension

        extension.CPU = dataclasses.replace(extension.CPU, path=pathlib.Path(path))
        reason = extension.why_no_cpu_kernels()
        if reason:
            raise SystemExit(reason)


def pytest_configure(config) -> None:
    use_named_library()
