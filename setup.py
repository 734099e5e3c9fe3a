"""Compiles the kernels into the package; build_backend/ says how. Everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.extension import Extension

BACKEND = str(Path(__file__).resolve().parent / "build_backend")
if BACKEND not in sys.path:
    sys.path.insert(0, BACKEND)

from flowseg_commands import BuildKernels, KernelDistribution, PlatformWheel  # noqa: E402

setup(
    ext_modules=[Extension("flowseg_kernels.lib", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=KernelDistribution,
)
