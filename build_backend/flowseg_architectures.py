"""The GPU architectures to compile for: those of TORCH_CUDA_ARCH_LIST, else of the GPUs here, else a list that serves all GPUs."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable

from flowseg_torch import Unbuildable

#: Compiled for without TORCH_CUDA_ARCH_LIST and without a GPU.
DEFAULT = "8.0;9.0+PTX"
#: Oldest architecture that the kernels are written for, as (major, minor).
OLDEST = (8, 0)
#: What torch's own extension builder takes the names of generations for.
NAMES = {
    "kepler": "3.5", "kepler+tesla": "3.7", "maxwell": "5.0;5.2+PTX", "maxwell+tegra": "5.3", "pascal": "6.0;6.1+PTX",
    "volta": "7.0+PTX", "volta+tegra": "7.2", "turing": "7.5+PTX", "ampere": "8.0;8.6+PTX", "ampere+tegra": "8.7",
    "ada": "8.9+PTX", "hopper": "9.0+PTX", "blackwell": "10.0;10.3;12.0;12.1+PTX", "blackwell+tegra": "11.0",
}  # fmt: skip
VARIABLE = "TORCH_CUDA_ARCH_LIST"


def code_flags(known: str, say: Callable[[str], None]) -> str:
    """nvcc's -gencode flags.

    Args:
        known: what `nvcc --list-gpu-arch` prints; "" when it prints nothing.
        say: called with one line that names the entries that are left out, and why.

    Raises:
        Unbuildable: for an entry of TORCH_CUDA_ARCH_LIST that is no architecture, and when none remains.
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


def entries(text: str) -> list[tuple[tuple[int, int], str, bool]]:
    """((major, minor), suffix "", "a" or "f", whether PTX too) for each entry, names resolved. Raises Unbuildable."""
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
    """ "9.0+PTX" for each kind of GPU here that the kernels run on; nvidia-smi tells without waking torch or a GPU."""
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
