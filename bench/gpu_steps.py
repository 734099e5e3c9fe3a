"""The steps of `make gpu-report`: command, time limit, and expected time on an H100.

`first` (at most 200 seconds) checks the kernels and times our own entries. `second` (at most 400 seconds) has the other tests, the
peers, the whole stack and the memory checker. `rest` takes half an hour and is for owners of a GPU.
"""

import dataclasses
import importlib.util
import os
import sys

#: Seconds that each preset may take.
BUDGETS = {"first": 200, "second": 400, "rest": 1800}
GPU_BACKENDS = ("cuda", "triton")
#: Sections of Nsight Compute per kernel.
SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    limit:     seconds after which the command is stopped
    expected:  seconds on an H100 with 16 cores, measured or estimated; `basis` says how
    bench:     the command writes a pytest-benchmark file, and the report keeps its rows
    vital:     all later steps depend on this one: the report ends if it fails
    """

    name: str
    preset: str
    command: tuple
    limit: float
    expected: float
    basis: str
    environment: dict = dataclasses.field(default_factory=dict)
    bench: bool = False
    vital: bool = False


def _pytest(*arguments):
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rfE", *arguments)


def _bench(name, preset, files, chosen, limit, expected, basis, dry, short):
    """A step of `pytest bench`. A dry run measures the entries `short` on the CPU at tiny sizes."""
    environment = {"FLOWSEG_BENCH_DEVICE": "cpu" if dry else "cuda", **({"FLOWSEG_BENCH_QUICK": "1"} if dry else {})}
    command = _pytest(*(f"bench/{file}" for file in files.split()), "-k", short if dry else chosen, "--durations=15")
    return Step(name, preset, command, limit, expected, basis, environment, bench=True)


def _tests(name, preset, backend, files, limit, expected, basis, dry, chosen="not two_to_the_31", processes=1):
    """A step of the tests on one backend. Several processes help only if kernels compile: each imports torch for seconds."""
    folder = "tests/flowseg_kernels"
    if dry:
        command = _pytest("-k", "cpu and zero", f"{folder}/ops/test_distance_correction.py")
        return Step(name, preset, command, limit, expected, basis, {"FLOWSEG_REQUIRE_BACKENDS": "cpu"})
    where = [f"{folder}/{file}" for file in files.split()]
    together = ("-n", str(min(processes, os.cpu_count() or 1))) if processes > 1 and _has_xdist() else ()
    command = _pytest(
        "-k", f"{backend} and ({chosen})", "--few-forms", "--maxfail=40", "--durations=15", *together, *where
    )
    return Step(name, preset, command, limit, expected, basis, {"FLOWSEG_REQUIRE_BACKENDS": backend})


def _has_xdist():
    return importlib.util.find_spec("xdist") is not None


def _checker(tool, backend, preset, limit, expected, dry):
    """One call of every op under compute-sanitizer, without torch's caching allocator: an overrun inside one of its cached blocks
    would touch allocated memory and go unnoticed."""
    checker = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only")
    # torch probes the driver for optional symbols; the API errors of these probes are harmless.
    checker += ("--report-api-errors", "no") if tool == "memcheck" else ()
    run = (sys.executable, "-m", "bench", "gpu-smoke", "calls", "--backend", "cpu" if dry else backend)
    command = (*run, "--device", "cpu") if dry else (*checker, *run)
    basis = "estimate: importing torch takes 15 s under the checker; kernels are up to 50 times slower"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(f"{tool} {backend}", preset, command, limit, expected, basis, environment)


def _profile(backend):
    """Counters of every kernel by Nsight Compute, at the size of the benchmarks. The clocks are not changed."""
    profiler = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "30")
    # Leave out torch's own kernels, which fill and copy.
    profiler += ("--kernel-name", "regex:^(?!vectorized_|elementwise_|unrolled_|reduce_|distribution_|index_)")
    sections = [part for name in SECTIONS for part in ("--section", name)]
    command = (
        *profiler,
        *sections,
        sys.executable,
        "-m",
        "bench",
        "gpu-smoke",
        "calls",
        "--large",
        "--backend",
        backend,
    )
    return Step(
        f"profile {backend}",
        "rest",
        command,
        120,
        60,
        "estimate: each of 30 launches runs 20 times, and its outputs are restored in between",
    )


def _smoke(name, preset, what, backend, limit, expected, basis, dry):
    command = (sys.executable, "-m", "bench", "gpu-smoke", what, "--backend", "cpu" if dry else backend)
    return Step(name, preset, command + (("--device", "cpu") if dry else ()), limit, expected, basis)


def _first(dry):
    load = (sys.executable, "-m", "bench", "gpu-smoke", "load", *(("--device", "cpu") if dry else ()))
    yield Step("load", "first", load, 150, 6, "measured; 60 s more if the library must be built", vital=True)
    yield _smoke("smoke cuda", "first", "ops", "cuda", 40, 10, "measured: 7 s alone, 17 s with other work running", dry)
    basis = "estimate: importing torch takes 6 s, each of 8 cases 1.5 s, mostly in fp64"
    yield _smoke("field cuda", "first", "field", "cuda", 40, 18, basis, dry)
    basis = "estimate: each case compiles for 20 s; 8 run in parallel"
    yield _smoke("smoke triton", "first", "ops", "triton", 70, 40, basis, dry)
    own = "ours and bfloat16 and (4096 or 1024)"
    basis = "measured for the 8 entries in Triton: 45 s, mostly compiling; estimate for the 8 in CUDA C++: 3 s each"
    yield _bench(
        "own field", "first", "test_neural_field.py", own, 105, 69, basis, dry, "ours and 4 and XL and float32"
    )
    own = "limit or (ours and not without and not coco512 and not many)"
    short = "limit or (ours and ade512 and (correction or 0.3))"
    files = "test_limits.py test_correction.py test_decode.py"
    basis = "measured: 34 entries in 37 s"
    yield _bench("own pixel ops", "first", files, own, 90, 55, basis, dry, short)


def _second(dry):
    basis = "estimate: those of the pixel ops take 25 s on one CPU core, those of the field 15 s"
    yield _tests("tests cuda", "second", "cuda", "ops test_gpu.py", 90, 55, basis, dry)
    # Includes our own entry, so that the ratios come from one run.
    peers = "(eager or compile or KeOps or (ours and cuda and not bf16)) and not random and not coco512 and not many"
    basis = "measured: 8 s per entry that compiles or captures its first graph"
    yield _bench("peers correction", "second", "test_correction.py", peers, 90, 60, basis, dry, "eager and ade512")
    peers = "(cdist or compiled or KeOps or flash or faiss or without or eager or (ours and cuda and not bf16))"
    peers += " and not random and not coco512"
    basis = "estimate: 20 entries of 1 s; KeOps and torch.compile take 10 s each"
    yield _bench("peers decoding", "second", "test_decode.py", peers, 80, 50, basis, dry, "cdist and ade512-0.3")
    peers, basis = (
        "XL and 4096 and bfloat16 and (eager or compile or ours)",
        "estimate: 8 entries of 4 s; two compile for 20 s each",
    )
    yield _bench("peers field", "second", "test_neural_field.py", peers, 95, 66, basis, dry, "eager and 4 and XL")
    basis = "measured: 17 s and 9 s for two of five entries; one of the others compiles for longer"
    yield _bench("stack L/16", "second", "test_stack.py", "L/16", 120, 85, basis, dry, "sampling and eager")
    basis = "estimate: 70 tests of 1 s in 4 processes; one compiles for 20 s"
    yield _tests("contract cuda", "second", "cuda", "test_contract.py", 80, 45, basis, dry, processes=4)
    yield _checker("memcheck", "cuda", "second", 60, 30, dry)


def _rest(dry):
    basis = "estimate: tables of 20,000 codes take 4 s on the CPU, twice"
    yield _smoke("guesses cuda", "rest", "guesses", "cuda", 60, 25, basis, dry)
    basis = "estimate: each of 5 cases compiles for 30 s, in parallel"
    yield _smoke("guesses triton", "rest", "guesses", "triton", 120, 60, basis, dry)
    yield _smoke("field triton", "rest", "field", "triton", 60, 25, "measured: 32 s in one process", dry)
    files = ("tests/flowseg/test_no_stall.py", "tests/flowseg_kernels/compose/test_no_read_back.py")
    basis = "estimate: two processes import torch for 5 s each, small kernels compile for 15 s"
    yield Step("no stall", "rest", _pytest("-k", "cuda", *files), 90, 30, basis)
    chosen, basis = "ours and many", "estimate: 18 entries of 2 s"
    files = "test_correction.py test_decode.py"
    yield _bench("many classes", "rest", files, chosen, 90, 45, basis, dry, "many and interpolate and ours")
    chosen, basis = "not bfloat16 or not (4096 or 1024)", "estimate: 68 entries of 2 s"
    yield _bench("field other sizes", "rest", "test_neural_field.py", chosen, 300, 150, basis, dry, "L-4")
    yield _bench(
        "stack nano", "rest", "test_stack.py", "nano", 120, 60, "estimate: 7 entries of 5 s", dry, "sampling and ours"
    )
    chosen, short = "ours or eager or cdist", "search_by_classes and ours"
    yield _bench("scaling", "rest", "test_scaling.py", chosen, 300, 150, "estimate: 70 entries of 1 s", dry, short)
    chosen, basis = "(ours and cuda) or eager or chunks", "estimate: 50 entries of 1.5 s"
    short = "training and 1000 and not 10000 and (ours or eager)"
    yield _bench("vocabulary", "rest", "test_vocabulary.py", chosen, 180, 75, basis, dry, short)
    chosen, basis = "ours or faiss", "estimate: 54 entries of 1.5 s"
    short = "150 and squares and ours"
    yield _bench("many channels", "rest", "test_decode_channels.py", chosen, 180, 80, basis, dry, short)
    files, basis = "ops test_gpu.py test_contract.py", "estimate: 400 kernels of 4 s each in 12 processes"
    yield _tests("tests triton", "rest", "triton", files, 400, 200, basis, dry, processes=12)
    yield _checker("memcheck", "triton", "rest", 120, 60, dry)
    for backend in GPU_BACKENDS:
        name, basis = f"tests beyond 2^31 {backend}", "estimate: 3 to 4 tests of 3 s, one after the other, on 20 GB"
        yield _tests(name, "rest", backend, "test_gpu.py", 60, 20, basis, dry, chosen="two_to_the_31")
        yield _checker("racecheck", backend, "rest", 200, 120, dry)
        if not dry:
            yield _profile(backend)


def steps(dry=False):
    """All steps in order; with `dry`, the same steps on the CPU at tiny sizes."""
    return [*_first(dry), *_second(dry), *_rest(dry)]


def narrowed(step, only):
    """A bench step restricted to the entries `only`; other steps unchanged."""
    if not only or not step.bench:
        return step
    place = step.command.index("-k") + 1
    chosen = f"({step.command[place]}) and ({only})"
    return dataclasses.replace(step, command=(*step.command[:place], chosen, *step.command[place + 1 :]))


def table(found):
    """Lines of a Markdown table: the steps with their expected seconds, and the sum of each preset."""
    yield "| step | preset | expected, s | limit, s | basis |"
    yield "|---|---|---|---|---|"
    for step in found:
        yield f"| {step.name} | {step.preset} | {step.expected:g} | {step.limit:g} | {step.basis} |"
    for preset, budget in BUDGETS.items():
        expected = [step.expected for step in found if step.preset == preset]
        if expected:
            yield f"| all of `{preset}` | {preset} | {sum(expected):g} | {budget} | |"
