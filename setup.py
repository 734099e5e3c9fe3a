"""Builds the compiled kernels beside the pure-Python package. Everything else is in pyproject.toml.

FLOWSEG_BUILD=auto (default): compile what this machine can and say in one line what is left out. cpu, cuda: its absence is an
error. none: pure Python. No network, no GPU, and torch is imported only while extensions are built.
"""

import contextlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
#: Oldest torch whose stable ABI the library uses; the only place it is written down.
TORCH_TARGET = "2.10"
LIBRARY = "libflowseg_cpu.so"

OPS = ("flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion", "neural_field")
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mf16c -mbmi -mbmi2",
}
#: Folders whose kernels.cpp is compiled once for each instruction set, with those that only they have.
KERNELS = {"chunk": {}, "field": {"avx512bf16": f"{ISA_FLAGS['avx512']} -mavx512bf16"}}
X86 = platform.machine().lower() in ("x86_64", "amd64")


def say(text: str) -> None:
    line = f"flowseg-kernels: {text}"
    print(line, file=sys.stderr)
    # pip shows a build's output only with -v; on a terminal a plain install should still tell what it left out.
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(line, file=terminal)


class Unbuildable(Exception):
    """What is missing, in one sentence."""


def mode() -> str:
    value = os.environ.get("FLOWSEG_BUILD", "auto").lower()
    if value not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"FLOWSEG_BUILD: wanted auto, cpu, cuda or none; got {value!r}")
    return value


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name.split()[0]):
            return name
    raise Unbuildable("no C++ compiler was found (g++ or clang++; or set CXX)")


def find_ninja() -> str:
    local = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(local) if local.exists() else None)
    if not found and importlib.util.find_spec("ninja"):
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    if not found:
        raise Unbuildable("ninja was not found (pip install ninja)")
    return found


def find_torch() -> tuple[str, Path]:
    """Version and folder of torch. The import also proves that it can be loaded."""
    if not importlib.util.find_spec("torch"):
        raise Unbuildable("torch is not installed in this environment (install torch first, then reinstall this)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the isolated environment has no NumPy, and the build needs none
            import torch
    except Exception as error:  # a broken torch must not break an installation that can do without kernels
        raise Unbuildable(f"torch does not import here ({type(error).__name__}: {error})") from None

    version = torch.__version__
    if tuple(int(p) for p in version.split("+")[0].split(".")[:2]) < tuple(int(p) for p in TORCH_TARGET.split(".")):
        raise Unbuildable(f"torch {version} is older than {TORCH_TARGET}")
    return version, Path(torch.__file__).parent


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def quoted(text: object) -> str:
    """For the command of a ninja rule: one shell word."""
    return shlex.quote(str(text)).replace("$", "$$")


def escaped(path: object) -> str:
    """For a path in a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(compiler: str, torch_folder: Path, target: Path) -> str:
    minor = int(TORCH_TARGET.split(".")[1])
    includes = f"-I{quoted(ROOT / 'csrc' / 'include')} -isystem {quoted(torch_folder / 'include')}"
    flags = (
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi "
        # GCC 12 warns about its own AVX-512 headers.
        f"-Wno-ignored-attributes -Wno-maybe-uninitialized {'-DFLOWSEG_X86 ' if X86 else ''}"
        f"-DTORCH_TARGET_VERSION=0x{2:02x}{minor:02x}000000000000 {os.environ.get('FLOWSEG_CXXFLAGS', '')}"
    )
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} {includes} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # No rpath and no Python: torch is already in the process when the library is loaded.
        f"  command = {compiler} -shared {os.environ.get('FLOWSEG_LDFLAGS', '')} $in -o $out "
        # libgcc first: its half-precision conversions are linked in, as older systems lack them in their shared one.
        f"-L{quoted(torch_folder / 'lib')} -ltorch -ltorch_cpu -lc10 -lgcc",
    ]
    objects = []
    for name in (*OPS, "dispatch"):
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {escaped(ROOT / 'csrc' / 'cpu' / name)}.cpp")
    for folder, own in KERNELS.items():
        for isa, isa_flags in {**ISA_FLAGS, **own}.items() if X86 else (("baseline", ""),):
            objects.append(f"{folder}_{isa}.o")
            source = escaped(ROOT / "csrc" / "cpu" / folder / "kernels.cpp")
            lines += [f"build {folder}_{isa}.o: compile {source}", f"  isa = {isa_flags}"]
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def jobs() -> int:
    """One compiler a core, and a GiB of memory each."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = 4
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(free), int(os.environ.get("MAX_JOBS") or cores)))


def build_cpu(folder: Path, work: Path) -> None:
    """Compile csrc/cpu to folder/libflowseg_cpu.so, with a record of how beside it. Raises Unbuildable."""
    if os.name != "posix" or sys.platform == "darwin":
        raise Unbuildable(f"the C++ kernels are built on Linux only, this is {sys.platform}")
    compiler = find_compiler()
    ninja = find_ninja()
    version, torch_folder = find_torch()
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    target = folder.resolve() / LIBRARY
    (work / "build.ninja").write_text(ninja_file(compiler, torch_folder, target))
    done = subprocess.run([ninja, "-C", str(work), f"-j{jobs()}"], capture_output=True, text=True)
    if done.returncode:
        log = work / "build.log"
        log.write_text(done.stdout + done.stderr)
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()] or [
            "no message"
        ]
        raise Unbuildable(f"they did not compile: {errors[0]} (all of it: {log})")
    facts = {
        "torch": version,
        "torch_target": TORCH_TARGET,
        "compiler": (output(*compiler.split(), "--version").splitlines() or ["?"])[0],
        "commit": output("git", "rev-parse", "--short", "HEAD") or None,
        "machine": platform.machine(),
    }
    target.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildKernels(build_ext):
    """Runs the builders that FLOWSEG_BUILD asks for in place of distutils' compile steps."""

    def run(self):
        wanted = mode()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / "flowseg_kernels" / "lib"
        self.built = []
        for stale in (folder / LIBRARY, (folder / LIBRARY).with_suffix(".json")):
            # Kernels of an earlier build must not pass for this one's.
            stale.unlink(missing_ok=True)
        if wanted == "cuda":
            raise SystemExit("FLOWSEG_BUILD=cuda: this version has no CUDA kernels; use auto, cpu or none")
        if wanted == "none":
            say("FLOWSEG_BUILD=none: no kernels are compiled; every op runs its plain PyTorch reference")
            return
        try:
            build_cpu(folder, Path(self.build_temp).resolve() / "flowseg")
            self.built = [folder / LIBRARY, (folder / LIBRARY).with_suffix(".json")]
            say("C++ kernels compiled")
        except Unbuildable as reason:
            if wanted == "cpu":
                raise SystemExit(f"FLOWSEG_BUILD=cpu: {reason}") from None
            say(f"C++ kernels left out: {reason}")

    def get_outputs(self):
        return [str(p) for p in getattr(self, "built", [])]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*"))]


class PlatformWheel(bdist_wheel):
    """The library needs no Python ABI: one wheel serves every Python 3 of the platform, and one without it every platform."""

    def get_tag(self):
        # Asked after the build, so it can follow what was compiled and not what was wanted.
        compiled = getattr(self.distribution.get_command_obj("build_ext"), "built", [])
        return ("py3", "none", super().get_tag()[2] if compiled else "any")


class KernelDistribution(Distribution):
    def has_ext_modules(self):
        return mode() != "none"


setup(
    ext_modules=[Extension("flowseg_kernels.lib", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=KernelDistribution,
)
