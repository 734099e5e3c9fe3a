"""Finds and loads the compiled libraries; on failure keeps one readable reason for each instead of raising."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import torch

from . import notice, settings
from .installation import compile_command

__all__ = ["CPU", "CUDA", "Library", "say_what_is_missing", "why_no_cpu_kernels", "why_no_cuda_kernels"]

_FOLDER = Path(__file__).resolve().parent.parent / "lib"


@dataclasses.dataclass(frozen=True)
class Library:
    """One shared object of kernels. It needs no Python and only the stable ABI of torch.

    path:     the shared object; a JSON file of the same name says how it was built.
    kernels:  what it holds, in words: "C++".
    needs:    what compiling it needs, in words.
    build:    the value of FLOWSEG_BUILD that makes its absence an error.
    """

    path: Path
    kernels: str
    needs: str
    build: str

    def facts(self) -> dict:
        """What it was built with (compiler, torch, architectures, commit), or {} when it was not built."""
        try:
            return json.loads(self.path.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return {}

    def load(self) -> str | None:
        """Load it into torch. None when that worked, else the reason in one sentence, with the command that mends it."""
        if settings.DISABLE_EXTENSION:
            return "FLOWSEG_DISABLE_EXTENSION=1 is set"
        if not self.path.exists():
            command = compile_command(self.build)
            return f"the {self.kernels} kernels were {self.why_not_compiled()}; with {self.needs}, compile them with: {command}"
        rebuild = f"rebuild it with: {compile_command(self.build)}"
        facts = self.facts()
        floor = facts.get("torch_target", "2.10")
        if _version(torch.__version__) < _version(floor):
            return f"the library needs torch {floor} or newer and this is torch {torch.__version__}; upgrade torch"
        if not _whole(self.path):
            return f"{self.path.name} is not a whole library: it was cut short or is of another kind; {rebuild}"
        try:
            torch.ops.load_library(str(self.path))
        except (OSError, RuntimeError) as error:
            return (
                f"{self.path.name}, built with torch {facts.get('torch', '?')} for stable ABI {floor}, "
                f"does not load into torch {torch.__version__} ({error.__cause__ or error}); {rebuild}"
            )
        without = self._ops_without_kernel()
        if without:
            return f"{self.path.name} is of another version: it has no kernel for {without[0]}; {rebuild}"
        return None

    def build_record(self) -> dict:
        """{"build": value of FLOWSEG_BUILD, "left_out": {"cpu" or "cuda": reason}} of the last build, or {} without a record."""
        try:
            return json.loads(self.path.with_name("build.json").read_text())
        except (OSError, ValueError):
            return {}

    def why_not_compiled(self) -> str:
        """What the build recorded about a library that is not there."""
        record = self.build_record()
        if record.get("build") == "none":
            return "not compiled when flowseg-kernels was installed, as FLOWSEG_BUILD=none asked"
        reason = record.get("left_out", {}).get(self.build)
        return f"not compiled when flowseg-kernels was installed{f' ({reason})' if reason else ''}"

    def _ops_without_kernel(self) -> list[str]:
        """Ops defined in Python for this library for which no library has brought a kernel."""
        namespace, key = f"flowseg_{self.build}::", self.build.upper()
        names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(namespace)]
        return sorted(n for n in names if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(n, key))


def _whole(path: Path) -> bool:
    """Whether a file is an ELF library to its end: the loader does not look, and reading what is missing kills the process."""
    with path.open("rb") as file:
        header = file.read(64)
    sections_at, size, count = (int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return len(header) == 64 and header[:4] == b"\x7fELF" and sections_at + size * count <= path.stat().st_size


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split("+")[0].split(".")[:2])


CPU = Library(_FOLDER / "libflowseg_cpu.so", "C++", "a C++ compiler", "cpu")
CUDA = Library(_FOLDER / "libflowseg_cuda.so", "CUDA", "nvcc", "cuda")


@functools.cache
def why_no_cpu_kernels() -> str | None:
    """None when the CPU kernels are loaded (loading them at the first call), else the reason in one sentence."""
    reason = CPU.load()
    if reason and CPU.path.exists():
        notice.say(f"the C++ kernels are not used: {reason}")
    return reason


@functools.cache
def why_no_cuda_kernels() -> str | None:
    """None when the CUDA kernels are loaded (loading them at the first call), else the reason in one sentence."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    facts = CUDA.facts()
    architectures, runtime = facts.get("architectures", ""), facts.get("cuda_runtime", "")
    reason = CUDA.load() or _why_not_this_gpu(architectures) or _why_not_this_driver(runtime)
    if reason and CUDA.path.exists() and _has_gpu():
        notice.say(f"the CUDA kernels are not used: {reason}")
    return reason


def say_what_is_missing() -> None:
    """Print one line about kernels that were not compiled and could have been: see runtime.notice for when it is silent.

    Missing CUDA kernels count where there is a GPU and torch has CUDA. Nothing is loaded and no GPU is woken.
    """
    if not sys.platform.startswith("linux") or CPU.build_record().get("build") == "none":
        return
    missing = [] if CPU.path.exists() else [CPU]
    if torch.version.cuda and _has_gpu() and not CUDA.path.exists():
        missing.append(CUDA)
    if missing:
        last = missing[-1]  # FLOWSEG_BUILD=cuda compiles both
        notice.say(
            f"the {' and '.join(library.kernels for library in missing)} kernels were {last.why_not_compiled()}; ops run without "
            f"them, many times slower where plain PyTorch takes their place; compile them with: {compile_command(last.build)}"
        )


def _has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU, without a call of CUDA, after which the process must not fork."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _why_not_this_gpu(architectures: str) -> str | None:
    """None when the library holds code for the current GPU ("sm_90"), or PTX of an older one ("compute_90"), or there is no GPU to
    ask."""
    if not architectures or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    for kind, number in re.findall(r"(sm|compute)_(\d+)", architectures):
        built = divmod(int(number), 10)
        # Machine code of a generation runs on its later members, PTX on everything that is newer.
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return None
    return (
        f"the CUDA kernels were compiled for {architectures} and this GPU is sm_{major}{minor}; rebuild them with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _driver_version(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """CUDA version that the installed driver is made for, None without one. Neither initialises the driver nor makes a context."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_not_this_driver(runtime: str) -> str | None:
    """None when the driver takes the CUDA runtime that is linked into the library ("13.0"), or there is no GPU to ask. A runtime of
    the same major version runs on any of its drivers."""
    driver = _driver_version() if runtime and torch.cuda.is_available() else None
    if driver is None or driver[0] >= _version(runtime)[0]:
        return None
    return (
        f"the CUDA kernels were built with CUDA {runtime} and this NVIDIA driver is for CUDA {driver[0]}.{driver[1]}; update the "
        f"driver, or rebuild them with nvcc {driver[0]}.x: export CUDA_HOME=FOLDER && {compile_command('cuda')}"
    )
