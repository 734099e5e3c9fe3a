"""The GPU architectures to compile for: those in TORCH_CUDA_ARCH_LIST, else those of this machine's GPUs, else DEFAULT."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable

from flowseg_toolchain import Unbuildable

#: Runs on every GPU from OLDEST on.
DEFAULT = "8.0;9.0+PTX"
#: The oldest architecture that the kernels support, as (major, minor).
OLDEST = (8, 0)
#: Names of GPU generations, with the meaning that torch's own extension builder gives them.
NAMES = {
    "kepler": "3.5", "kepler+tesla": "3.7", "maxwell": "5.0;5.2+PTX", "maxwell+tegra": "5.3", "pascal": "6.0;6.1+PTX",
    "volta": "7.0+PTX", "volta+tegra": "7.2", "turing": "7.5+PTX", "ampere": "8.0;8.6+PTX", "ampere+tegra": "8.7",
    "ada": "8.9+PTX", "hopper": "9.0+PTX", "blackwell": "10.0;10.3;12.0;12.1+PTX", "blackwell+tegra": "11.0",
}  # fmt: skip
VARIABLE = "TORCH_CUDA_ARCH_LIST"
#: Code with wgmma, which runs on GPUs of compute capability 9.0 only, and the oldest CUDA that compiles it.
HOPPER_FLAGS = "-gencode=arch=compute_90a,code=sm_90a"
HOPPER_CUDA = (12, 0)


def code_flags(known: str, say: Callable[[str], None]) -> str:
    """Return nvcc's -gencode flags.

    Args:
        known: the output of `nvcc --list-gpu-arch`; "" if it has none.
        say: called with one line that says which entries are left out, and why.

    Raises:
        Unbuildable: if an entry of TORCH_CUDA_ARCH_LIST is not an architecture, or if no architecture is left.
    """
    asked = os.environ.get(VARIABLE, "").strip(" ;,")
    source = VARIABLE if asked and asked != "native" else "architectures"
    wanted = entries(asked) if source == VARIABLE else entries(";".join(of_gpus()) or DEFAULT)
    supported = set(known.split())
    flags, old, unknown = {}, [], []
    for number, suffix, ptx in wanted:
        name = f"{number[0]}{number[1]}{suffix}"
        if number < OLDEST:
            old.append(f"{number[0]}.{number[1]}{suffix}")
        elif supported and f"compute_{number[0]}{number[1]}" not in supported:
            unknown.append(f"{number[0]}.{number[1]}{suffix}")
        else:
            flags[f"-gencode=arch=compute_{name},code=sm_{name}"] = True
            if ptx:
                flags[f"-gencode=arch=compute_{name},code=compute_{name}"] = True
    reasons = [f"{', '.join(dict.fromkeys(old))} (the kernels need {OLDEST[0]}.{OLDEST[1]} or newer)"] if old else []
    reasons += [f"{', '.join(dict.fromkeys(unknown))} (this nvcc does not know it)"] if unknown else []
    if not flags:
        raise Unbuildable(
            f"{source}: no GPU architecture remains without {' and '.join(reasons)}; set {VARIABLE} to one such as 9.0"
        )
    if reasons:
        say(f"{source}: left out {' and '.join(reasons)}")
    return " ".join(flags)


def why_no_hopper_code(flags: str, release: str) -> str | None:
    """None if kernels with HOPPER_FLAGS belong into a library whose other kernels have `flags`, else the reason.

    Args:
        release: the version of nvcc, such as "12.8"; "?" if it is unknown.
    """
    if not re.search(r"arch=compute_90a?,code=sm_90", flags):
        return "the architectures to compile for have no 9.0"
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and tuple(map(int, numbers.groups())) < HOPPER_CUDA:
        return f"nvcc {release} does not know sm_90a; {HOPPER_CUDA[0]}.{HOPPER_CUDA[1]} or newer does"
    return None


def entries(text: str) -> list[tuple[tuple[int, int], str, bool]]:
    """Return ((major, minor), suffix, with PTX) per entry; the suffix is "", "a" or "f". Replaces names. Raises Unbuildable."""
    found = []
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        name, plus, ptx = entry.lower().partition("+ptx")
        if name in NAMES and not ptx:
            found += entries(NAMES[name])
            if plus:
                found[-1] = (*found[-1][:2], True)
            continue
        parts = re.fullmatch(r"(\d+)\.?(\d)([af]?)", name)
        if not parts or ptx:
            raise Unbuildable(f"{VARIABLE}: wanted entries such as 9.0, 12.0+PTX or Ampere; got {entry!r}")
        found.append(((int(parts[1]), int(parts[2])), parts[3], bool(plus)))
    return found


def of_gpus() -> list[str]:
    """An entry such as "9.0+PTX" per kind of GPU in this machine that the kernels support. nvidia-smi lists them without torch."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {tuple(map(int, m)) for m in re.findall(r"^(\d+)\.(\d+)\s*$", done.stdout, re.MULTILINE)}
    return [f"{major}.{minor}+PTX" for major, minor in sorted(found) if (major, minor) >= OLDEST]
