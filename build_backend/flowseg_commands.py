"""The steps of setuptools that compile the kernels and name the wheel.

FLOWSEG_BUILD says what to compile:
    auto: what this machine can compile; one line says what is left out. This is the default.
    cpu:  the C++ kernels; it is an error if they cannot be compiled.
    cuda: the C++ and the CUDA kernels, the latter even for a torch without CUDA; it is an error if they cannot be compiled.
    none: nothing.
A build needs no network and no GPU, and imports torch only to find its headers. flowseg_kernels/lib/build.json records what was
asked for and what was left out.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from flowseg_libraries import CPU_LIBRARY, CUDA_LIBRARY, build_cpu, build_cuda, say
from flowseg_toolchain import ROOT, Unbuildable
from setuptools import Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

RECORD = "build.json"


def mode() -> str:
    """The value of FLOWSEG_BUILD."""
    value = os.environ.get("FLOWSEG_BUILD", "auto").lower()
    if value not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"FLOWSEG_BUILD: wanted auto, cpu, cuda or none; got {value!r}")
    return value


def progress(line: str) -> None:
    """Print a line of a compiler at once: `pip -v` shows it."""
    print(line, file=sys.stderr, flush=True)


class BuildKernels(build_ext):
    """Compiles the kernels that FLOWSEG_BUILD asks for, in place of an extension module."""

    def run(self):
        wanted = mode()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / "flowseg_kernels" / "lib"
        self.libraries_built, self.left_out = [], {}
        # Remove the kernels of an earlier build, which could be taken for this one's.
        for library in (CPU_LIBRARY, CUDA_LIBRARY):
            (folder / library).unlink(missing_ok=True)
            (folder / library).with_suffix(".json").unlink(missing_ok=True)
        self.record = folder / RECORD
        self.record.unlink(missing_ok=True)
        work = Path(self.build_temp).resolve()
        if wanted == "none":
            say("FLOWSEG_BUILD=none: no kernels are compiled; every op runs its plain PyTorch reference")
        else:
            build = lambda: build_cpu(folder, work / "flowseg", progress)  # noqa: E731
            self.build_one("cpu", "C++", folder / CPU_LIBRARY, wanted != "auto", build)
        if wanted in ("auto", "cuda"):
            forced = wanted == "cuda"
            build = lambda: build_cuda(folder, work / "flowseg_cuda", forced, progress)  # noqa: E731
            self.build_one("cuda", "CUDA", folder / CUDA_LIBRARY, forced, build)
        folder.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps({"build": wanted, "left_out": self.left_out}, indent=1) + "\n")
        if "cpu" in self.left_out:
            say(
                "INSTALLED WITHOUT ITS C++ KERNELS: the ops run, many times slower, on plain PyTorch. "
                "`python -m flowseg_kernels.info` gives the command that compiles them"
            )

    def build_one(self, name: str, kernels: str, library: Path, required: bool, build: Callable[[], None]) -> None:
        """Build one library; if that is impossible, exit if it is `required`, else note the reason."""
        try:
            build()
            self.libraries_built += [library, library.with_suffix(".json")]
            say(f"{kernels} kernels compiled")
        except Unbuildable as reason:
            if required:
                raise SystemExit(f"FLOWSEG_BUILD={mode()}: {reason}") from None
            if str(reason) not in self.left_out.values():
                say(f"{kernels} kernels left out: {reason}")
            self.left_out[name] = str(reason)

    def get_outputs(self):
        return [str(p) for p in (*getattr(self, "libraries_built", []), getattr(self, "record", None)) if p]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*"))]


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM, or py3-none-any if it has no library. The libraries use no Python ABI."""

    def get_tag(self):
        # setuptools asks after the build, so the name follows what was compiled, not what was asked for.
        compiled = getattr(self.distribution.get_command_obj("build_ext"), "libraries_built", [])
        return ("py3", "none", super().get_tag()[2] if compiled else "any")


class KernelDistribution(Distribution):
    """Always runs BuildKernels: with FLOWSEG_BUILD=none too, it removes the kernels of an earlier build."""

    def has_ext_modules(self):
        return True
