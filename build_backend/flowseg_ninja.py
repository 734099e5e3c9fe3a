"""The ninja files that compile the kernels, and the lists of what is compiled with which flags."""

import os
import platform
import shlex
from pathlib import Path

from flowseg_architectures import HOPPER_FLAGS
from flowseg_toolchain import ROOT, output
from flowseg_torch import TORCH_TARGET

X86 = platform.machine().lower() in ("x86_64", "amd64")
#: Compiler flags per instruction set. csrc/cpu/isa.cpp checks at run time that the CPU has every feature named here.
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2",
    "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mf16c -mbmi -mbmi2",
}
#: csrc/cpu/NAME.cpp
CPU_OPS = (
    "flow_interpolate", "distance_correction", "flow_loss", "nearest_centroid", "decode_confusion", "class_probabilities",
    "top_classes", "neural_field",
)  # fmt: skip
#: Sources in csrc/cpu that are compiled once per instruction set, with the flags of each.
CPU_KERNELS = {
    "pixel/all": ISA_FLAGS,
    "field/kernels": {**ISA_FLAGS, "avx512bf16": f"{ISA_FLAGS['avx512']} -mavx512bf16"},
}
#: csrc/cuda/NAME.cu. The slowest to compile come first, so that no core waits for one at the end.
CUDA_OPS = (
    "neural_field", "flow_loss", "distance_correction", "decode_confusion", "nearest_centroid", "top_classes",
    "class_probabilities", "flow_interpolate",
)  # fmt: skip
#: Those of CUDA_OPS that are compiled for sm_90a only.
HOPPER_OPS = ("neural_field",)


def cpu_ninja_file(
    compiler: str, torch_folder: Path, target: Path, *, root: Path = ROOT, instruction_sets: bool = X86
) -> str:
    """The ninja file for the C++ kernels.

    Args:
        root: the tree with the sources.
        instruction_sets: False to compile for the baseline instruction set only.
    """
    # GCC 12 warns about its own AVX-512 headers, clang about a loop whose body is a lambda.
    clang = "clang" in output(*compiler.split(), "--version")
    quiet = "-Wno-for-loop-analysis" if clang else "-Wno-maybe-uninitialized"
    flags = (
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi "
        f"-Wno-ignored-attributes {quiet} {'-DFLOWSEG_X86 ' if instruction_sets else ''}"
        f"{_includes_and_target(root, torch_folder)} {os.environ.get('FLOWSEG_CXXFLAGS', '')}"
    )
    # Set no rpath and link no Python: the process has loaded torch before the library. Do not link libc10: the library would import
    # C++ library functions from it, and the libc10 of another torch may not have them. Link libgcc statically: the shared libgcc of
    # older systems lacks the conversions of fp16.
    link = (
        f"{compiler} -shared {os.environ.get('FLOWSEG_LDFLAGS', '')} $in -o $out "
        f"-L{_quoted(torch_folder / 'lib')} -ltorch -ltorch_cpu -lgcc"
    )
    folder = root / "csrc" / "cpu"
    builds = []
    # The kernels come before the launchers, and AVX-512 first: they take longest to compile.
    for source, sets in CPU_KERNELS.items():
        for isa, isa_flags in reversed(sets.items()) if instruction_sets else (("baseline", ""),):
            builds.append((f"{source.replace('/', '_')}_{isa}.o", folder / f"{source}.cpp", isa_flags))
    builds += [(f"{name}.o", folder / f"{name}.cpp", "") for name in (*CPU_OPS, "isa")]
    return _ninja_file("C++", f"{compiler} {flags}", link, builds, target)


def cuda_ninja_file(
    nvcc: str, architectures: str, torch_folder: Path, target: Path, jobs: int, *, ops: tuple[str, ...] = CUDA_OPS
) -> str:
    """The ninja file for the CUDA kernels.

    Args:
        architectures: nvcc's -gencode flags of all ops but HOPPER_OPS.
        jobs: how many compilers run at once.
    """
    # Compile the architectures of a file in parallel only if there are more jobs than files.
    threads = max(1, jobs // len(ops))
    flags = (
        f"-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -DUSE_CUDA --threads={threads} "
        f"{_includes_and_target(ROOT, torch_folder)} {os.environ.get('FLOWSEG_NVCCFLAGS', '')}"
    )
    # Link the CUDA runtime statically: torch's own may have another major version. Keep libtorch although the library uses no
    # symbol of libtorch itself: libtorch loads libtorch_cuda.
    link = (
        f"{_quoted(nvcc)} -shared -cudart=static $in -o $out -L{_quoted(torch_folder / 'lib')} "
        "-Xlinker=--no-as-needed -ltorch -ltorch_cpu"
    )
    builds = [
        (f"{name}.o", ROOT / "csrc" / "cuda" / f"{name}.cu", HOPPER_FLAGS if name in HOPPER_OPS else architectures)
        for name in ops
    ]
    return _ninja_file("CUDA", f"{_quoted(nvcc)} {flags}", link, builds, target)


def _ninja_file(language: str, compile_: str, link: str, builds: list[tuple[str, Path, str]], target: Path) -> str:
    """A ninja file from (object, source, extra flags) and the commands that compile and link them."""
    lines = [
        "rule compile",
        f"  command = {compile_} $more -MMD -MF $out.d -c $in -o $out",
        f"  description = {language} $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link}",
        f"  description = {language} $out",
    ]
    for name, source, more in builds:
        lines += [f"build {name}: compile {_escaped(source)}", f"  more = {more}"]
    lines.append(f"build {_escaped(target)}: link {' '.join(name for name, _, _ in builds)}")
    return "\n".join(lines) + "\n"


def _includes_and_target(root: Path, torch_folder: Path) -> str:
    folders = f"-I{_quoted(root / 'csrc')} -isystem {_quoted(torch_folder / 'include')}"
    return f"{folders} -DTORCH_TARGET_VERSION=0x{2:02x}{int(TORCH_TARGET.split('.')[1]):02x}000000000000"


def _quoted(text: object) -> str:
    """One shell word of the command of a ninja rule."""
    return shlex.quote(str(text)).replace("$", "$$")


def _escaped(path: object) -> str:
    """A path of a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
