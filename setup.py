"""Builds the compiled kernels beside the pure-Python package. Everything else is in pyproject.toml.

FLOWSEG_BUILD=auto (default): compile what this machine can and say in one line what is left out. cpu: the C++ kernels, their
absence is an error. cuda: these and the CUDA kernels, likewise, even for a torch without CUDA. none: pure Python. No network, no
GPU, and torch is imported only while extensions are built.
"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
#: Oldest torch whose stable ABI the library uses; the only place it is written down.
TORCH_TARGET = "2.10"
CPU_LIBRARY, CUDA_LIBRARY = "libflowseg_cpu.so", "libflowseg_cuda.so"

PIXEL_OPS = ("flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion")
CPU_OPS, CUDA_OPS = (*PIXEL_OPS, "neural_field"), PIXEL_OPS
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mf16c -mbmi -mbmi2",
}
#: GPU architectures that are compiled for unless TORCH_CUDA_ARCH_LIST names others; the newest also as PTX, for those to come.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
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


def find_nvcc() -> str:
    for folder in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if (Path(folder) / "bin" / "nvcc").exists():
            return str(Path(folder) / "bin" / "nvcc")
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Unbuildable("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    return found


def code_flags(nvcc: str) -> str:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST, or for the default architectures that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    known = output(nvcc, "--list-gpu-arch")
    flags = []
    for entry in filter(None, (asked or ARCHITECTURES).split(";")):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            raise Unbuildable(f"TORCH_CUDA_ARCH_LIST: wanted entries such as 9.0 or 12.0+PTX; got {entry!r}")
        if not asked and known and f"compute_{number}" not in known:
            say(f"this nvcc does not know compute_{number}: kernels for it are left out")
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


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


def includes_and_target(torch_folder: Path) -> str:
    folders = (
        f"-I{quoted(ROOT / 'csrc')} -I{quoted(ROOT / 'csrc' / 'include')} -isystem {quoted(torch_folder / 'include')}"
    )
    return f"{folders} -DTORCH_TARGET_VERSION=0x{2:02x}{int(TORCH_TARGET.split('.')[1]):02x}000000000000"


def cpu_ninja_file(compiler: str, torch_folder: Path, target: Path) -> str:
    flags = (
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi "
        # GCC 12 warns about its own AVX-512 headers.
        f"-Wno-ignored-attributes -Wno-maybe-uninitialized {'-DFLOWSEG_X86 ' if X86 else ''}"
        f"{includes_and_target(torch_folder)} {os.environ.get('FLOWSEG_CXXFLAGS', '')}"
    )
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # No rpath and no Python: torch is already in the process when the library is loaded. No libc10: it would lend copies of C++
        # library functions that another torch may not have.
        f"  command = {compiler} -shared {os.environ.get('FLOWSEG_LDFLAGS', '')} $in -o $out "
        # libgcc first: its half-precision conversions are linked in, as older systems lack them in their shared one.
        f"-L{quoted(torch_folder / 'lib')} -ltorch -ltorch_cpu -lgcc",
    ]
    objects = []
    for name in (*CPU_OPS, "dispatch"):
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {escaped(ROOT / 'csrc' / 'cpu' / name)}.cpp")
    for folder, own in KERNELS.items():
        for isa, isa_flags in {**ISA_FLAGS, **own}.items() if X86 else (("baseline", ""),):
            objects.append(f"{folder}_{isa}.o")
            source = escaped(ROOT / "csrc" / "cpu" / folder / "kernels.cpp")
            lines += [f"build {folder}_{isa}.o: compile {source}", f"  isa = {isa_flags}"]
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_ninja_file(nvcc: str, torch_folder: Path, target: Path) -> str:
    # Architectures of one file in parallel only where there are more cores than files.
    threads = max(1, jobs() // len(CUDA_OPS))
    flags = (
        f"-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -DUSE_CUDA --threads={threads} {code_flags(nvcc)} "
        f"{includes_and_target(torch_folder)} {os.environ.get('FLOWSEG_NVCCFLAGS', '')}"
    )
    lines = [
        "rule compile",
        f"  command = {quoted(nvcc)} {flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # The CUDA runtime is linked in: torch's own may be of another major version. libtorch brings libtorch_cuda with it at load
        # time, so it must be kept although nothing here is found in it.
        f"  command = {quoted(nvcc)} -shared -cudart=static $in -o $out -L{quoted(torch_folder / 'lib')} "
        "-Xlinker=--no-as-needed -ltorch -ltorch_cpu",
    ]
    for name in CUDA_OPS:
        lines.append(f"build {name}.o: compile {escaped(ROOT / 'csrc' / 'cuda' / name)}.cu")
    lines.append(f"build {escaped(target)}: link {' '.join(f'{name}.o' for name in CUDA_OPS)}")
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
    require_linux()
    compiler = find_compiler()
    version, torch_folder = find_torch()
    compile_library(folder / CPU_LIBRARY, work, lambda target: cpu_ninja_file(compiler, torch_folder, target))
    facts = {"compiler": (output(*compiler.split(), "--version").splitlines() or ["?"])[0], "torch": version}
    write_facts(folder / CPU_LIBRARY, facts)


def build_cuda(folder: Path, work: Path, forced: bool) -> None:
    """Compile csrc/cuda to folder/libflowseg_cuda.so. Raises Unbuildable; unless forced, also for a torch without CUDA."""
    require_linux()
    version, torch_folder = find_torch()
    import torch

    if not torch.version.cuda and not forced:
        raise Unbuildable(f"torch {version} is built without CUDA")
    nvcc = find_nvcc()
    compile_library(folder / CUDA_LIBRARY, work, lambda target: cuda_ninja_file(nvcc, torch_folder, target))
    release = re.search(r"release (\S+),", output(nvcc, "--version"))
    architectures = re.findall(r",code=(\w+)", code_flags(nvcc))
    facts = {
        "compiler": f"nvcc {release[1] if release else '?'}",
        "architectures": ", ".join(architectures),
        **({"cuda_runtime": release[1]} if release else {}),
        "torch": version,
    }
    write_facts(folder / CUDA_LIBRARY, facts)


def require_linux() -> None:
    if os.name != "posix" or sys.platform == "darwin":
        raise Unbuildable(f"kernels are compiled on Linux only, this is {sys.platform}")


def compile_library(path: Path, work: Path, ninja_file: Callable[[Path], str]) -> None:
    ninja = find_ninja()
    path.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file(path.resolve()))
    done = subprocess.run([ninja, "-C", str(work), f"-j{jobs()}"], capture_output=True, text=True)
    if done.returncode:
        log = work / "build.log"
        log.write_text(done.stdout + done.stderr)
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()] or [
            "no message"
        ]
        raise Unbuildable(f"they did not compile: {errors[0]} (all of it: {log})")


def write_facts(library: Path, facts: dict) -> None:
    commit = output("git", "rev-parse", "--short", "HEAD") or None
    facts = {**facts, "torch_target": TORCH_TARGET, "commit": commit, "machine": platform.machine()}
    library.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


class BuildKernels(build_ext):
    """Runs the builders that FLOWSEG_BUILD asks for in place of distutils' compile steps."""

    def run(self):
        wanted = mode()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / "flowseg_kernels" / "lib"
        self.built = []
        for library in (CPU_LIBRARY, CUDA_LIBRARY):
            # Kernels of an earlier build must not pass for this one's.
            (folder / library).unlink(missing_ok=True)
            (folder / library).with_suffix(".json").unlink(missing_ok=True)
        if wanted == "none":
            say("FLOWSEG_BUILD=none: no kernels are compiled; every op runs its plain PyTorch reference")
            return
        work = Path(self.build_temp).resolve()
        self.build_one("C++", folder / CPU_LIBRARY, wanted != "auto", lambda: build_cpu(folder, work / "flowseg"))
        if wanted != "cpu":
            forced = wanted == "cuda"
            build = lambda: build_cuda(folder, work / "flowseg_cuda", forced)  # noqa: E731
            self.build_one("CUDA", folder / CUDA_LIBRARY, forced, build)

    def build_one(self, kernels: str, library: Path, required: bool, build: Callable[[], None]) -> None:
        try:
            build()
            self.built += [library, library.with_suffix(".json")]
            say(f"{kernels} kernels compiled")
        except Unbuildable as reason:
            if required:
                raise SystemExit(f"FLOWSEG_BUILD={mode()}: {reason}") from None
            say(f"{kernels} kernels left out: {reason}")

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
