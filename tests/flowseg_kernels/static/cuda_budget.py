"""What the CUDA kernels cost by their machine code: registers on every architecture, instructions of the inner loops on sm_90.

`python -m tests.flowseg_kernels.static.cuda_budget` compiles every kernel for every architecture (7 minutes of one core), writes
what it finds to budget.json and prints the table of docs/notes/static_counts.md. No GPU is needed.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import pathlib
import re
import subprocess

from . import sass

ROOT = pathlib.Path(__file__).resolve().parents[3]
PATH = pathlib.Path(__file__).with_name("budget.json")
NOTES = ROOT / "docs" / "notes" / "static_counts.md"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
THREADS, WIDE = 128, 512  # a block, as csrc/cuda/platform.cuh has it; the wide one is that of the grid
#: What a multiprocessor of sm_90 has, and the lane-instructions a second that an H200 is taken to issue.
REGISTERS, MOST_THREADS, LANE_INSTRUCTIONS = 65536, 2048, 33e12


@functools.cache
def cubin(architecture: int, every: bool) -> pathlib.Path:
    """Machine code of every kernel, or of those of three channels in fp32 with the default transform."""
    folder = ROOT / "build" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"sm_{architecture}{'' if every else '_three_channels'}.cubin"
    kernels = pathlib.Path(__file__).with_name("kernels.cu")
    headers = [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h")]
    if not target.exists() or target.stat().st_mtime < max(s.stat().st_mtime for s in (kernels, *headers)):
        command = [sass.find_tool("nvcc"), "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin",
                   *([] if every else ["-DFLOWSEG_ONLY_3"]), f"-I{ROOT}/csrc", kernels]  # fmt: skip
        done = subprocess.run([*command, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return target


def compiler() -> str:
    """Such as "nvcc 13.0"."""
    said = subprocess.run([sass.find_tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', said)[1]}"


def form(name: str) -> str:
    """Kernel, compute type and channels of a mangled name: _ZN7flowseg4cuda7correctIfLi3E...: "correct float 3"."""
    length = re.match(r"_ZN7flowseg4cudaL?(\d+)", name)
    assert length, name
    rest = name[length.end() :]
    kernel, rest = rest[: int(length[1])], rest[int(length[1]) :]
    found = re.match(r"I([fd])(?:Li(\d+)E)?", rest)
    return kernel if not found else " ".join(filter(None, (kernel, {"f": "float", "d": "double"}[found[1]], found[2])))


def resources(architecture: int, every: bool) -> dict[str, dict[str, int]]:
    """Registers and bytes of local memory by form, the most of its transforms and other variants."""
    found: dict[str, dict[str, int]] = {}
    for name, used in sass.resources(cubin(architecture, every)).items():
        # Spilled registers live in the stack frame.
        now = {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}
        before = found.setdefault(form(name), now)
        found[form(name)] = {k: max(v, before[k]) for k, v in now.items()}
    return found


@functools.cache
def code() -> dict[str, list[sass.Instruction]]:
    """Machine code of every kernel for sm_90, by mangled name."""
    return sass.disassemble(cubin(90, every=True))


def _loops(kernel: str) -> list[sass.Loop]:
    return [loop for name, body in code().items() if form(name) == kernel for loop in sass.innermost_loops(body)]


def instructions() -> dict[str, dict[str, float]]:
    """Instructions of the loops of three channels in fp32 on sm_90.

    A (pixel, class) of the correction has one reciprocal and no logarithm: two loops, runs without an own class and with one. A
    candidate of decoding has one product, its other squares are multiply-adds.
    """
    found: dict[str, dict[str, float]] = {}
    for kernel in ("correct", "loss"):
        loops = [loop for loop in _loops(f"{kernel} float 3") if loop.opcodes()["MUFU"] == 16]
        loops = [loop for loop in loops if all("MUFU.RCP" in i.text for i in loop.body if i.opcode == "MUFU")]
        costs = sorted({len(loop) / 16 for loop in loops})
        assert len(costs) == 2, costs
        found[kernel] = dict(zip(("rivals", "rivals and own class"), costs))
    # A list is read in eight loads, the bare codes in six.
    loops = [loop for loop in _loops("decode_by_grid") if loop.opcodes()["FMUL"] == 8]
    found["decode_by_grid"] = {
        name: max(len(loop) / 8 for loop in loops if loop.opcodes()["LDG"] == loads)
        for name, loads in (("listed candidate", 8), ("centroid outside the grid", 6))
    }
    loops = [loop for loop in _loops("decode_by_search float 3") if loop.opcodes()["FMUL"] == 16]
    costs = sorted({len(loop) / 16 for loop in loops})
    assert len(costs) == 2, costs
    found["decode_by_search"] = dict(zip(("centroid", "centroid, with the second nearest"), costs))
    return {kernel: {k: round(v, 2) for k, v in costs.items()} for kernel, costs in found.items()}


def table(budget: dict) -> str:
    """The static figures of the notes, in Markdown."""
    lines = [
        "| kernel, `C = 3`, fp32 inside | | instructions | registers | threads of an SM in use | H200, K = 150, at most |",
        "|---|---|---|---|---|---|",
    ]
    titles = {"correct": "distance_correction, a pixel and class", "loss": "flow_loss, a pixel and class",
              "decode_by_grid": "decoding by grid", "decode_by_search": "decoding by search"}  # fmt: skip
    for kernel, costs in budget["instructions"].items():
        used = budget["registers"].get(kernel) or budget["registers"][f"{kernel} float 3"]
        registers = used["90"]
        threads = WIDE if kernel == "decode_by_grid" else THREADS
        blocks = REGISTERS // ((registers + 7) // 8 * 8 * threads)
        share = f"{blocks} blocks of {threads}: {100 * blocks * threads / MOST_THREADS:.0f} %"
        for i, (name, cost) in enumerate(costs.items()):
            rate = f"{LANE_INSTRUCTIONS / 150 / cost / 1e9:.1f} Gpixel/s" if kernel != "decode_by_grid" else ""
            first = (titles[kernel], registers, share) if i == 0 else ("", "", "")
            lines.append(f"| {first[0]} | {name} | {cost:g} | {first[1]} | {first[2]} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda a: cubin(a, True), ARCHITECTURES))
    registers: dict[str, dict[str, int]] = {}
    for architecture in ARCHITECTURES:
        for name, used in resources(architecture, every=True).items():
            assert not used["spilled"], f"{name} spills {used['spilled']} bytes on sm_{architecture}"
            registers.setdefault(name, {})[str(architecture)] = used["registers"]
    budget = {"compiler": compiler(), "registers": dict(sorted(registers.items())), "instructions": instructions()}
    text = json.dumps(budget, indent=1)
    # One line a kernel.
    PATH.write_text(re.sub(r'\{\s+("[^{}]*?)\s+\}', lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n")
    print(table(budget))


if __name__ == "__main__":
    main()
