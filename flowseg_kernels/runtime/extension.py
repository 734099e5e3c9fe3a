"""Finds and loads the compiled libraries; on failure keeps one readable reason for each instead of raising."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import re
from pathlib import Path

import torch

from . import settings

__all__ = ["CPU", "CUDA", "Library", "why_no_cpu_kernels", "why_no_cuda_kernels"]

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
        rebuild = f"rebuild it with: FLOWSEG_BUILD={self.build} pip install --no-build-isolation --force-reinstall --no-deps ."
        if settings.DISABLE_EXTENSION:
            return "FLOWSEG_DISABLE_EXTENSION=1 is set"
        if not self.path.exists():
            return f"the {self.kernels} kernels were not compiled when flowseg-kernels was installed; with {self.needs}, {rebuild}"
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
    return CPU.load()


@functools.cache
def why_no_cuda_kernels() -> str | None:
    """None when the CUDA kernels are loaded (loading them at the first call), else the reason in one sentence."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    facts = CUDA.facts()
    architectures, runtime = facts.get("architectures", ""), facts.get("cuda_runtime", "")
    return CUDA.load() or _why_not_this_gpu(architectures) or _why_not_this_driver(runtime)


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
        f"driver, or rebuild them with nvcc {driver[0]}.x: CUDA_HOME=FOLDER FLOWSEG_BUILD=cuda pip install "
        f"--no-build-isolation --force-reinstall --no-deps ."
    )
