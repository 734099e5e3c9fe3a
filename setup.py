"""Builds the compiled kernels beside the pure-Python package. Everything else is in pyproject.toml.

FLOWSEG_BUILD=auto (default): compile what this machine can and say in one line what is left out. cpu: the C++ kernels, their
absence is an error. cuda: these and the CUDA kernels, likewise, even for a torch without CUDA. none: pure Python. No network, no
GPU, and torch is imported only while extensions are built. flowseg_kernels/lib/build.json records what was asked for and left out.
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
from collections.abc import Callable
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
if str(ROOT / "build_backend") not in sys.path:
    sys.path.insert(0, str(ROOT / "build_backend"))

import flowseg_architectures  # noqa: E402
from flowseg_jobs import jobs  # noqa: E402
from flowseg_torch import TORCH_TARGET, Unbuildable, find_torch  # noqa: E402

CPU_LIBRARY, CUDA_LIBRARY, RECORD = "libflowseg_cpu.so", "libflowseg_cuda.so", "build.json"

PIXEL_OPS = ("flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion")
CPU_OPS = (*PIXEL_OPS, "neural_field")
#: Those that take longest to compile first, so that no core waits for one at the end.
CUDA_OPS = ("flow_loss", "distance_correction", "decode_confusion", "nearest_centroid", "flow_interpolate")
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mf16c -mbmi -mbmi2",
}
#: Folders whose kernels.cpp is compiled once for each instruction set, with those that only they have.
KERNELS = {"chunk": {}, "field": {"avx512bf16": f"{ISA_FLAGS['avx512']} -mavx512bf16"}}
#: Memory of one compiler at its largest, in GiB.
CPU_GIB, CUDA_GIB = 1.0, 1.0
X86 = platform.machine().lower() in ("x86_64", "amd64")


def say(text: str) -> None:
    line = f"flowseg-kernels: {text}"
    print(line, file=sys.stderr)
    # pip shows a build's output only with -v; on a terminal a plain install should still tell what it left out.
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(line, file=terminal)


def progress(line: str) -> None:
    """What the compilers print, as it comes: `pip -v` shows it."""
    print(line, file=sys.stderr, flush=True)


def no_progress(line: str) -> None:
    """Says nothing."""


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
    """nvcc's -gencode flags for the architectures that are asked for and that this nvcc knows."""
    return flowseg_architectures.code_flags(output(nvcc, "--list-gpu-arch"), say)


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
    folders = f"-I{quoted(ROOT / 'csrc')} -isystem {quoted(torch_folder / 'include')}"
    return f"{folders} -DTORCH_TARGET_VERSION=0x{2:02x}{int(TORCH_TARGET.split('.')[1]):02x}000000000000"


def cpu_ninja_file(compiler: str, torch_folder: Path, target: Path) -> str:
    # GCC 12 warns about its own AVX-512 headers, clang about a loop whose body is a lambda.
    clang = "clang" in output(*compiler.split(), "--version")
    quiet = "-Wno-for-loop-analysis" if clang else "-Wno-maybe-uninitialized"
    flags = (
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi "
        f"-Wno-ignored-attributes {quiet} {'-DFLOWSEG_X86 ' if X86 else ''}"
        f"{includes_and_target(torch_folder)} {os.environ.get('FLOWSEG_CXXFLAGS', '')}"
    )
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $isa -MMD -MF $out.d -c $in -o $out",
        "  description = C++ $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = C++ $out",
        # No rpath and no Python: torch is already in the process when the library is loaded. No libc10: it would lend copies of C++
        # library functions that another torch may not have.
        f"  command = {compiler} -shared {os.environ.get('FLOWSEG_LDFLAGS', '')} $in -o $out "
        # libgcc first: its half-precision conversions are linked in, as older systems lack them in their shared one.
        f"-L{quoted(torch_folder / 'lib')} -ltorch -ltorch_cpu -lgcc",
    ]
    objects = []
    for folder, own in KERNELS.items():
        for isa, isa_flags in reversed({**ISA_FLAGS, **own}.items()) if X86 else (("baseline", ""),):
            objects.append(f"{folder}_{isa}.o")
            source = escaped(ROOT / "csrc" / "cpu" / folder / "kernels.cpp")
            lines += [f"build {folder}_{isa}.o: compile {source}", f"  isa = {isa_flags}"]
    # The kernels above, AVX-512 first, take longest to compile.
    for name in (*CPU_OPS, "dispatch"):
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {escaped(ROOT / 'csrc' / 'cpu' / name)}.cpp")
    lines.append(f"build {escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_ninja_file(nvcc: str, architectures: str, torch_folder: Path, target: Path) -> str:
    # Architectures of one file in parallel only where there are more cores than files.
    threads = max(1, jobs(CUDA_GIB) // len(CUDA_OPS))
    flags = (
        f"-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -DUSE_CUDA --threads={threads} {architectures} "
        f"{includes_and_target(torch_folder)} {os.environ.get('FLOWSEG_NVCCFLAGS', '')}"
    )
    lines = [
        "rule compile",
        f"  command = {quoted(nvcc)} {flags} -MMD -MF $out.d -c $in -o $out",
        "  description = CUDA $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = CUDA $out",
        # The CUDA runtime is linked in: torch's own may be of another major version. libtorch brings libtorch_cuda with it at load
        # time, so it must be kept although nothing here is found in it.
        f"  command = {quoted(nvcc)} -shared -cudart=static $in -o $out -L{quoted(torch_folder / 'lib')} "
        "-Xlinker=--no-as-needed -ltorch -ltorch_cpu",
    ]
    for name in CUDA_OPS:
        lines.append(f"build {name}.o: compile {escaped(ROOT / 'csrc' / 'cuda' / name)}.cu")
    lines.append(f"build {escaped(target)}: link {' '.join(f'{name}.o' for name in CUDA_OPS)}")
    return "\n".join(lines) + "\n"


def build_cpu(folder: Path, work: Path, show: Callable[[str], None] = no_progress) -> None:
    """Compile csrc/cpu to folder/libflowseg_cpu.so, with a record of how beside it. Raises Unbuildable.

    Args:
        show: called with each line that the compilers print, as it comes.
    """
    require_linux()
    compiler = find_compiler()
    torch = find_torch()
    show(f"C++ kernels: compiling with {compiler}, against torch {torch.version} of {torch.owner}")
    text = lambda target: cpu_ninja_file(compiler, torch.folder, target)  # noqa: E731
    compile_library(folder / CPU_LIBRARY, work, text, jobs(CPU_GIB), show)
    facts = {"compiler": (output(*compiler.split(), "--version").splitlines() or ["?"])[0], "torch": torch.version}
    write_facts(folder / CPU_LIBRARY, facts)


def build_cuda(folder: Path, work: Path, forced: bool, show: Callable[[str], None] = no_progress) -> None:
    """Compile csrc/cuda to folder/libflowseg_cuda.so. Raises Unbuildable; unless forced, also for a torch without CUDA."""
    require_linux()
    torch = find_torch()
    if not torch.cuda and not forced:
        raise Unbuildable(f"torch {torch.version} is built without CUDA")
    nvcc = find_nvcc()
    flags = code_flags(nvcc)
    architectures = ", ".join(re.findall(r",code=(\w+)", flags))
    show(f"CUDA kernels: compiling for {architectures} with {nvcc}, against torch {torch.version} of {torch.owner}")
    text = lambda target: cuda_ninja_file(nvcc, flags, torch.folder, target)  # noqa: E731
    compile_library(folder / CUDA_LIBRARY, work, text, jobs(CUDA_GIB), show)
    release = re.search(r"release (\S+),", output(nvcc, "--version"))
    facts = {
        "compiler": f"nvcc {release[1] if release else '?'}",
        "architectures": architectures,
        **({"cuda_runtime": release[1]} if release else {}),
        "torch": torch.version,
    }
    write_facts(folder / CUDA_LIBRARY, facts)


def require_linux() -> None:
    if os.name != "posix" or sys.platform == "darwin":
        raise Unbuildable(f"kernels are compiled on Linux only, this is {sys.platform}")


def compile_library(
    path: Path, work: Path, ninja_file: Callable[[Path], str], at_once: int, show: Callable[[str], None]
) -> None:
    ninja = find_ninja()
    path.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file(path.resolve()))
    command = [ninja, "-C", str(work), f"-j{at_once}"]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            lines.append(line)
            show(line.rstrip("\n"))
    if process.returncode:
        log = work / "build.log"
        log.write_text("".join(lines))
        errors = [line.strip() for line in lines if "error" in line.lower()] or ["no message"]
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
        self.libraries_built, self.left_out = [], {}
        for library in (CPU_LIBRARY, CUDA_LIBRARY):
            # Kernels of an earlier build must not pass for this one's.
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
    """The library needs no Python ABI: one wheel serves every Python 3 of the platform, and one without it every platform."""

    def get_tag(self):
        # Asked after the build, so it can follow what was compiled and not what was wanted.
        compiled = getattr(self.distribution.get_command_obj("build_ext"), "libraries_built", [])
        return ("py3", "none", super().get_tag()[2] if compiled else "any")


class KernelDistribution(Distribution):
    def has_ext_modules(self):
        return True  # FLOWSEG_BUILD=none too: its step removes the kernels of an earlier build


setup(
    ext_modules=[Extension("flowseg_kernels.lib", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=KernelDistribution,
)
