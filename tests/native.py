"""Builds of the C++ kernels other than the installed one: with a sanitizer, with counters, of a changed copy.

As a pytest plugin (-p tests.native) it makes the tests run the library that FLOWSEG_TEST_LIBRARY names.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = "libflowseg_cpu.so"


def build(
    folder: pathlib.Path, flags: str = "", link: str = "", *, root: pathlib.Path = ROOT, sets: bool = True
) -> pathlib.Path:
    """Compile the C++ kernels of `root` into `folder`, by setup.py itself; only what changed since the last time.

    Args:
        flags, link: compiler and linker flags after setup.py's own.
        sets: False to compile for the baseline instruction set alone, in a third of the time.
    """
    spec = importlib.util.spec_from_file_location("flowseg_setup", root / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(setup)
    environment = {"FLOWSEG_CXXFLAGS": flags, "FLOWSEG_LDFLAGS": link}
    with mock.patch.dict(os.environ, environment), mock.patch.object(setup, "X86", setup.X86 and sets):
        setup.build_cpu(folder, folder / "objects")
    return folder / LIBRARY


def use_named_library() -> None:
    """Take the library that FLOWSEG_TEST_LIBRARY names in place of the installed one."""
    path = os.environ.get("FLOWSEG_TEST_LIBRARY")
    if path:
        from flowseg_kernels.runtime import extension

        extension.CPU = dataclasses.replace(extension.CPU, path=pathlib.Path(path))
        reason = extension.why_no_cpu_kernels()
        if reason:
            raise SystemExit(reason)


def pytest_configure(config) -> None:
    use_named_library()
