"""The compiled libraries: find and load them; if one is missing, say why and which command compiles it.

A library that does not load is no error: its reason is kept, and ops use another backend.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import shlex
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import torch

from . import backend

__all__ = [
    "CPU",
    "CUDA",
    "HOPPER",
    "Library",
    "compile_command",
    "say_what_is_missing",
    "why_no_cpu_kernels",
    "why_no_cuda_kernels",
    "why_no_hopper_kernels",
]

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDER = _PACKAGE / "lib"
_DISTRIBUTION = "flowseg-kernels"
#: The compute capability of GPUs with wgmma, whose code runs on no other.
HOPPER = (9, 0)

#: FLOWSEG_DISABLE_EXTENSION=1 leaves the compiled libraries unloaded, for example to find the cause of a crash.
DISABLE_EXTENSION: bool = os.environ.get("FLOWSEG_DISABLE_EXTENSION", "0") == "1"

#: Variables in which torchrun, srun and mpirun give each process its number. Only process 0 prints the notice.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")

#: Source in the compile command when the place of the sources is unknown.
_CLONE = ".  # in a clone of the project"
#: Build requirements of pyproject.toml. A build without isolation does not install them.
_TOOLS = "'setuptools>=77' ninja"


@dataclasses.dataclass(frozen=True)
class Library:
    """One shared library of kernels. It does not link Python and uses only the stable ABI of torch.

    path:     the library; a JSON file of the same name records how it was built.
    kernels:  the language of its kernels, for messages: "C++".
    needs:    what compiling it requires, for messages.
    build:    the value of FLOWSEG_BUILD that makes its absence an error.
    """

    path: Path
    kernels: str
    needs: str
    build: str

    def facts(self) -> dict:
        """How it was built (compiler, torch, architectures, commit), or {} when it was not built."""
        try:
            return json.loads(self.path.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return {}

    def load(self) -> str | None:
        """Load it into torch. Return None on success, else the reason in one sentence with the command that fixes it."""
        if DISABLE_EXTENSION:
            return "FLOWSEG_DISABLE_EXTENSION=1 is set"
        if not self.path.exists():
            command = compile_command(self.build)
            return f"the {self.kernels} kernels were {self.why_not_compiled()}; with {self.needs}, compile them with: {command}"
        rebuild = f"rebuild it with: {compile_command(self.build)}"
        facts = self.facts()
        floor = facts.get("torch_target", "2.10")
        if _version(torch.__version__) < _version(floor):
            return f"the library needs torch {floor} or newer and this is torch {torch.__version__}; upgrade torch"
        if not _is_complete(self.path):
            return f"{self.path.name} is truncated or is not an ELF shared library; {rebuild}"
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
        """The recorded reason why the build left this library out, as the end of a sentence "the kernels were ..."."""
        record = self.build_record()
        if record.get("build") == "none":
            return "not compiled when flowseg-kernels was installed, as FLOWSEG_BUILD=none asked"
        reason = record.get("left_out", {}).get(self.build)
        return f"not compiled when flowseg-kernels was installed{f' ({reason})' if reason else ''}"

    def left_out(self) -> dict[str, str]:
        """Op name -> the reason why the build left its kernels out of this library."""
        return self.facts().get("left_out", {})

    def _ops_without_kernel(self) -> list[str]:
        """Ops that Python defines for this library and that have no kernel after loading, except those that were left out."""
        namespace, key, left_out = f"flowseg_{self.build}::", self.build.upper(), self.left_out()
        names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(namespace)]
        return sorted(
            n
            for n in names
            if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(n, key)
            and n.removeprefix(namespace).removesuffix("_bwd") not in left_out
        )


def _is_complete(path: Path) -> bool:
    """Whether a file is an ELF library of full length. The loader does not check; reading a missing part kills the process."""
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
    """None when the CPU kernels are loaded (the first call loads them), else the reason in one sentence."""
    reason = CPU.load()
    if reason and CPU.path.exists():
        _print_once(f"the C++ kernels are not used: {reason}")
    return reason


@functools.cache
def why_no_cuda_kernels() -> str | None:
    """None when the CUDA kernels are loaded (the first call loads them), else the reason in one sentence."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    facts = CUDA.facts()
    architectures, runtime = facts.get("architectures", ""), facts.get("cuda_runtime", "")
    reason = CUDA.load() or _why_not_this_gpu(architectures) or _why_not_this_driver(runtime)
    if reason and CUDA.path.exists() and _has_gpu():
        _print_once(f"the CUDA kernels are not used: {reason}")
    return reason


@functools.cache
def why_no_hopper_kernels(op: str) -> str | None:
    """The reason against the CUDA kernels of an op that has them for compute capability 9.0 only: the GPUs, or the library's build.

    None if they can run on one of the GPUs, or without a GPU if the library has them. The library must be loaded.
    """
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if found and HOPPER not in found:
        shown = ", ".join(f"{major}.{minor}" for major, minor in sorted(found))
        return f"the CUDA kernels of {op} need a GPU of compute capability 9.0 (Hopper); this one has {shown}"
    reason = CUDA.left_out().get(op)
    return reason and (
        f"the CUDA kernels of {op} were left out of the library ({reason}); compile them with: "
        f"export TORCH_CUDA_ARCH_LIST=9.0 && {compile_command('cuda')}"
    )


def _has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU. Does not call CUDA: a process that did must not fork."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _why_not_this_gpu(architectures: str) -> str | None:
    """None when the library has code for the current GPU ("sm_90") or PTX for an older one ("compute_90"), or without a GPU."""
    if not architectures or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    for kind, number in re.findall(r"(sm|compute)_(\d+)", architectures):
        built = divmod(int(number), 10)
        # Machine code runs on later GPUs of the same generation; PTX runs on every later GPU.
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return None
    return (
        f"the CUDA kernels were compiled for {architectures} and this GPU is sm_{major}{minor}; rebuild them with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _driver_version(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """CUDA version that the installed driver supports, or None. Neither initialises the driver nor makes a context."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_not_this_driver(runtime: str) -> str | None:
    """None when the driver supports the CUDA runtime linked into the library ("13.0"), or without a GPU.

    A runtime runs on any driver of the same major version.
    """
    driver = _driver_version() if runtime and torch.cuda.is_available() else None
    if driver is None or driver[0] >= _version(runtime)[0]:
        return None
    return (
        f"the CUDA kernels were built with CUDA {runtime} and this NVIDIA driver is for CUDA {driver[0]}.{driver[1]}; update the "
        f"driver, or rebuild them with nvcc {driver[0]}.x: export CUDA_HOME=FOLDER && {compile_command('cuda')}"
    )


def say_what_is_missing() -> None:
    """Print one line about kernels that could have been compiled and were not.

    CUDA kernels are missed only with a GPU and a torch with CUDA. This function loads no library and does not touch the GPU.
    """
    if not sys.platform.startswith("linux") or CPU.build_record().get("build") == "none":
        return
    missing = [] if CPU.path.exists() else [CPU]
    if torch.version.cuda and _has_gpu() and not CUDA.path.exists():
        missing.append(CUDA)
    if missing:
        last = missing[-1]  # FLOWSEG_BUILD=cuda compiles both
        _print_once(
            f"the {' and '.join(library.kernels for library in missing)} kernels were {last.why_not_compiled()}; ops run without "
            f"them, many times slower where plain PyTorch takes their place; compile them with: {compile_command(last.build)}"
        )


def _print_once(text: str) -> None:
    """Print a line to stderr, once per process and not in the processes it starts.

    Silent with FLOWSEG_NOTICE=0, and if an environment variable chose the backend or disabled the libraries.
    """
    chosen = backend.DEFAULT_BACKEND or DISABLE_EXTENSION
    # Printing sets the variable, and child processes inherit it.
    silenced = os.environ.get("FLOWSEG_NOTICE", "1") == "0"
    if chosen or silenced or any(os.environ.get(rank, "0") != "0" for rank in _RANKS):
        return
    os.environ["FLOWSEG_NOTICE"] = "0"
    if sys.stderr is not None:
        print(f"flowseg-kernels: {text} (FLOWSEG_NOTICE=0 silences this line)", file=sys.stderr, flush=True)


def compile_command(build: str) -> str:
    """A shell command that reinstalls this package with its kernels into this environment, or fails with what is missing.

    The environment needs only torch: the command installs the build tools. It builds without isolation, so the kernels are
    compiled against this environment's torch.

    Args:
        build: value of FLOWSEG_BUILD, "cpu" or "cuda".
    """
    python, source = shlex.quote(sys.executable), _source()
    if _distribution_text("INSTALLER").strip() == "uv":
        install = f"uv pip install --python {python}"
        again = "--reinstall"
    else:
        install = f"{python} -m pip install"
        again = "--no-cache-dir --force-reinstall"
    return f"{install} {_TOOLS} && FLOWSEG_BUILD={build} {install} --no-build-isolation {again} --no-deps {source}"


def _source() -> str:
    """The pip source to install from: the imported checkout, else the origin of the installed copy."""
    checkout = _PACKAGE.parent
    if (checkout / "setup.py").exists() and (checkout / "csrc").is_dir():
        return f"-e {shlex.quote(str(checkout))}"
    try:
        origin = json.loads(_distribution_text("direct_url.json"))
        url = origin["url"]
    except (ValueError, KeyError):
        return _CLONE
    if "vcs_info" in origin:
        return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
    address = urllib.parse.urlparse(url)
    path = Path(urllib.request.url2pathname(address.path))
    if address.scheme != "file" or path.suffix == ".whl" or not path.exists():
        return _CLONE
    return shlex.quote(str(path))


def _distribution_text(name: str) -> str:
    """A metadata file of the installed distribution; "" if the package is not installed."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return distribution.read_text(name) or ""
