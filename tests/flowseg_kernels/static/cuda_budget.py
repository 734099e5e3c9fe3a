"""The cost of the CUDA kernels, read from their machine code: registers on every architecture, instructions per loop on sm_90.

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
#: Threads per block: kThreads and kGridThreads of csrc/cuda/block.cuh.
THREADS, GRID_THREADS = 128, 512
#: The kernels whose machine code is read, by short name.
READ = (
    *("correct float 3", "correct float 8", "loss float 3", "loss float 8"),
    *("decode_by_grid", "decode_by_search float 3", "decode_by_guesses float 8"),
    *("interpolate float", "interpolate_backward float", "scale float"),
)
#: Kernels whose time per pixel does not follow from the cost per class.
WITH_TABLES = ("decode_by_grid", "decode_by_guesses 8")
#: Kernels by guesses, of which only the form for four channels is compiled where only three channels are.
FEWEST_CHANNELS = ("decode_by_guesses float 4", "confusion_by_guesses float 4")
#: Limits of a multiprocessor of sm_90, and the lane-instructions per second that we assume for an H200.
REGISTERS, MAX_THREADS, LANE_INSTRUCTIONS = 65536, 2048, 33e12


@functools.cache
def cubin(architecture: int, every: bool) -> pathlib.Path:
    """Compile every kernel, or only those for three channels, fp32 and the default transform. Returns the path of the cubin."""
    folder = ROOT / "build" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"sm_{architecture}{'' if every else '_three_channels'}.cubin"
    kernels = pathlib.Path(__file__).with_name("kernels.cu")
    headers = [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h")]
    if not target.exists() or target.stat().st_mtime < max(s.stat().st_mtime for s in (kernels, *headers)):
        command = [sass.find_tool("nvcc"), "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin",
                   *([] if every else ["-DFLOWSEG_ONLY_FP32_C3"]), f"-I{ROOT}/csrc", kernels]  # fmt: skip
        done = subprocess.run([*command, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return target


def compiler() -> str:
    """The name and version of the compiler, for example "nvcc 13.0"."""
    output = subprocess.run([sass.find_tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', output)[1]}"


def short_name(name: str) -> str:
    """Kernel, compute type and channels of a mangled name: "correct float 3" of _ZN7flowseg4cuda7correctIfLi3E..."""
    length = re.match(r"_ZN7flowseg4cudaL?(\d+)", name)
    assert length, name
    rest = name[length.end() :]
    kernel, rest = rest[: int(length[1])], rest[int(length[1]) :]
    found = re.match(r"I([fd])(?:Li(\d+)E)?", rest)
    return kernel if not found else " ".join(filter(None, (kernel, {"f": "float", "d": "double"}[found[1]], found[2])))


def resources(architecture: int, every: bool) -> dict[str, dict[str, int]]:
    """Registers and bytes of spilled registers by short name, the maximum over transforms and other variants."""
    found: dict[str, dict[str, int]] = {}
    for mangled, used in sass.resources(cubin(architecture, every)).items():
        # The compiler spills registers to the stack frame.
        now = {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}
        name = short_name(mangled)
        before = found.setdefault(name, now)
        found[name] = {k: max(v, before[k]) for k, v in now.items()}
    return found


@functools.cache
def code() -> dict[str, list[sass.Instruction]]:
    """The machine code for sm_90 of the kernels that tests look at, by mangled name."""
    binary = cubin(90, every=True)
    return sass.disassemble(binary, [name for name in sass.resources(binary) if short_name(name) in READ])


def _loops(kernel: str, template: str = "") -> list[sass.Loop]:
    """The innermost loops of a kernel, given by its short name and a part of its mangled template arguments."""
    bodies = [body for name, body in code().items() if short_name(name) == kernel and template in name]
    return [loop for body in bodies for loop in sass.innermost_loops(body)]


def instructions() -> dict[str, dict[str, float]]:
    """Instructions per pair (pixel, class) or per candidate in the inner loops, in fp32 on sm_90, for three channels if not named.

    Loops are found by what a pair takes. In the correction it takes one reciprocal and no logarithm, in loops over runs of classes
    without or with a pixel's own class. In decoding a candidate takes one multiplication; the other squares are multiply-adds.
    """
    found: dict[str, dict[str, float]] = {}
    for kernel in ("correct", "loss"):
        for channels, name in ((3, kernel), (8, f"{kernel} 8")):
            loops = [loop for loop in _loops(f"{kernel} float {channels}") if loop.opcodes()["MUFU"] >= 4]
            loops = [loop for loop in loops if all("MUFU.RCP" in i.text for i in loop.body if i.opcode == "MUFU")]
            costs = {len(loop) / loop.opcodes()["MUFU"] for loop in loops}
            # All classes, a run without an own class, and a run that may contain one.
            assert 2 <= len(costs) <= 3, costs
            found[name] = {"rivals": min(costs), "rivals and own class": max(costs)}
    # A list is read eight candidates at a time. For a point outside the grid each lane takes one centroid per iteration, from
    # shared memory or, with more than 1024 classes, from global memory.
    # Three dtypes; with and without words, except for the margin. Measure is 0 for labels alone, 1 for distance, 2 for margin.
    found["decode_by_grid"] = {}
    for measures, forms, more in (("01", 12, ""), ("2", 3, ", with the second nearest")):
        loops = [loop for measure in measures for loop in _loops("decode_by_grid", f"MeasureE{measure}E")]
        listed = [loop for loop in loops if loop.opcodes()["FMUL"] == 8]
        shared = [loop for loop in loops if loop.opcodes()["FMUL"] == 1]
        assert len(listed) == len(shared) == forms, (len(listed), len(shared))
        found["decode_by_grid"] |= {
            f"listed candidate{more}": max(len(loop) / 8 for loop in listed),
            f"32 centroids, for a point outside the grid{more}": max(map(len, shared)),
        }
    loops = [loop for loop in _loops("decode_by_search float 3") if loop.opcodes()["FMUL"] == 16]
    costs = sorted({len(loop) / 16 for loop in loops})
    assert len(costs) == 2, costs
    found["decode_by_search"] = dict(zip(("centroid", "centroid, with the second nearest"), costs))
    found["decode_by_guesses 8"] = _guesses(8, pixels_per_thread=2)
    return {kernel: {k: round(v, 2) for k, v in costs.items()} for kernel, costs in found.items()}


def _guesses(channels: int, pixels_per_thread: int) -> dict[str, float]:
    """Instructions of decoding by guesses, the maximum over the forms with and without the second nearest.

    A pass guesses one pixel per thread. It contains the votes of the warp and the loop over the classes of a cell. All instructions
    of a pass count, and those that nearly no pixel needs: a cell with one class, channels other than 8, NaN, the rivals.
    """
    passes, shared, searched = [], [], []
    for name, body in code().items():
        if short_name(name) != f"decode_by_guesses float {channels}":
            continue
        innermost = sass.innermost_loops(body)
        products = {id(loop): loop.opcodes()["FMUL"] for loop in innermost}
        (tried, *_) = [loop for loop in innermost if products[id(loop)] == 1]
        passes.append(
            min(len(loop) for loop in sass.loops(body) if loop.first < tried.first and tried.last < loop.last)
        )
        # Two classes per iteration.
        shared += [len(loop) / 2 for loop in innermost if products[id(loop)] == 2]
        searched += [
            len(loop) / (2 * pixels_per_thread) for loop in innermost if products[id(loop)] == 2 * pixels_per_thread
        ]
    assert len(passes) == 2 and shared and len(searched) == 2, (passes, shared, searched)
    return {
        "a pass: a pixel per thread guessed, its class tried on the others": max(passes),
        "32 centroids, for a pixel without a proof": max(shared),
        "centroid, where most guesses fail": min(searched),
    }


def table(budget: dict) -> str:
    """The Markdown table of the notes."""
    lines = [
        "| kernel, fp32, `C = 3` if not named | | instructions | registers | threads of an SM in use | H200, K = 150, at most |",
        "|---|---|---|---|---|---|",
    ]
    titles = {"correct": "distance_correction, per pixel and class", "correct 8": "the same, `C = 8`",
              "loss": "flow_loss, per pixel and class", "loss 8": "the same, `C = 8`",
              "decode_by_grid": "decoding by grid", "decode_by_search": "decoding by search",
              "decode_by_guesses 8": "decoding by guesses, `C = 8`"}  # fmt: skip
    for kernel, costs in budget["instructions"].items():
        name, _, channels = kernel.partition(" ")
        used = budget["registers"].get(kernel) or budget["registers"][f"{name} float {channels or 3}"]
        registers = used["90"]
        threads = GRID_THREADS if kernel == "decode_by_grid" else THREADS
        blocks = REGISTERS // ((registers + 7) // 8 * 8 * threads)
        share = f"{blocks} blocks of {threads}: {100 * blocks * threads / MAX_THREADS:.0f} %"
        for i, (part, cost) in enumerate(costs.items()):
            rate = f"{LANE_INSTRUCTIONS / 150 / cost / 1e9:.1f} Gpixel/s" if kernel not in WITH_TABLES else ""
            first = (titles[kernel], registers, share) if i == 0 else ("", "", "")
            lines.append(f"| {first[0]} | {part} | {cost:g} | {first[1]} | {first[2]} | {rate} |")
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
    # One line per kernel.
    PATH.write_text(re.sub(r'\{\s+("[^{}]*?)\s+\}', lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n")
    print(table(budget))


if __name__ == "__main__":
    main()
