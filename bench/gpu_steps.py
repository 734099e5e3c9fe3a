"""The steps of `make gpu-report`: what each runs, how long it may take, and how long it should take on an H100.

`first` says in at most 200 seconds what is right and how fast our own kernels are. `second` takes at most 400 seconds more: the
other tests, the peers, the whole stack, the memory checker. `rest` is for whoever owns a GPU.
"""

import dataclasses
import importlib.util
import os
import sys

#: Seconds that each preset may take.
BUDGETS = {"first": 200, "second": 400, "rest": 1800}
GPU_BACKENDS = ("cuda", "triton")
#: What Nsight Compute says of each kernel.
SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    limit:     seconds after which it is stopped
    expected:  seconds that it takes on an H100 with 16 cores: measured, or estimated as `basis` says
    bench:     it writes a pytest-benchmark file, whose rows are kept
    vital:     without it no later step can tell anything: the report ends if it fails
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
    """A step of `pytest bench`; a dry run takes the entries `short` on the CPU at tiny sizes."""
    environment = {"FLOWSEG_BENCH_DEVICE": "cpu" if dry else "cuda", **({"FLOWSEG_BENCH_QUICK": "1"} if dry else {})}
    command = _pytest(*(f"bench/{file}" for file in files.split()), "-k", short if dry else chosen, "--durations=15")
    return Step(name, preset, command, limit, expected, basis, environment, bench=True)


def _tests(name, preset, backend, files, limit, expected, basis, dry, chosen="not two_to_the_31", processes=1):
    """A step of the tests on one backend. More processes pay where kernels compile: each takes seconds to import torch."""
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
    """One call of every op under compute-sanitizer, each allocation on its own: inside a block of torch's cache an overrun would
    touch memory that is allocated."""
    checker = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only")
    # torch asks the driver for symbols that it may lack, which is no fault of a kernel.
    checker += ("--report-api-errors", "no") if tool == "memcheck" else ()
    run = (sys.executable, "-m", "bench.gpu_smoke", "calls", "--backend", "cpu" if dry else backend)
    command = (*run, "--device", "cpu") if dry else (*checker, *run)
    basis = "importing torch under the checker takes 15 s, kernels run up to 50 times as long"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(f"{tool} {backend}", preset, command, limit, expected, basis, environment)


def _profile(backend):
    """Every kernel's counters, at the benches' size, by Nsight Compute. The clocks stay as they are."""
    profiler = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "30")
    # torch's own kernels, which fill and copy, are left out.
    profiler += ("--kernel-name", "regex:^(?!vectorized_|elementwise_|unrolled_|reduce_|distribution_|index_)")
    sections = [part for name in SECTIONS for part in ("--section", name)]
    command = (*profiler, *sections, sys.executable, "-m", "bench.gpu_smoke", "calls", "--large", "--backend", backend)
    return Step(
        f"profile {backend}",
        "rest",
        command,
        120,
        60,
        "30 launches, each run some 20 times, and their outputs restored in between",
    )


def _smoke(name, what, backend, limit, expected, basis, dry):
    command = (sys.executable, "-m", "bench.gpu_smoke", what, "--backend", "cpu" if dry else backend)
    return Step(name, "first", command + (("--device", "cpu") if dry else ()), limit, expected, basis)


def _first(dry):
    load = (sys.executable, "-m", "bench.gpu_smoke", "load", *(("--device", "cpu") if dry else ()))
    yield Step("load", "first", load, 150, 6, "measured; 60 s more if the library has to be built", vital=True)
    yield _smoke("smoke cuda", "ops", "cuda", 40, 10, "measured as 7 alone, 17 beside other work", dry)
    yield _smoke("smoke triton", "ops", "triton", 70, 40, "a case takes 20 s to compile, 8 run at once", dry)
    yield _smoke("field", "field", "triton", 60, 25, "measured as 32 in one process", dry)
    own = "ours and bfloat16 and (4096 or 1024)"
    basis = "measured: 8 s for the first call of each form, 3 for others"
    yield _bench("own field", "first", "test_neural_field.py", own, 80, 45, basis, dry, "ours and 4 and XL and float32")
    own = "limit or (ours and not without and not coco512 and not many)"
    short = "limit or (ours and ade512 and (correction or 0.3))"
    files = "test_limits.py test_correction.py test_decode.py"
    basis = "measured: 34 entries in 37"
    yield _bench("own pixel ops", "first", files, own, 90, 55, basis, dry, short)


def _second(dry):
    basis = "as on one core of a CPU, where they take 25 s"
    yield _tests("tests cuda", "second", "cuda", "ops test_gpu.py", 70, 40, basis, dry)
    # One entry of ours beside the peers, so that a ratio is of one run.
    peers = "(eager or compile or KeOps or (ours and cuda and not bf16)) and not random and not coco512 and not many"
    basis = "measured: 8 s per entry that compiles or builds its graph for the first time"
    yield _bench("peers correction", "second", "test_correction.py", peers, 90, 60, basis, dry, "eager and ade512")
    peers = "(cdist or compiled or KeOps or flash or faiss or without or eager or (ours and cuda and not bf16))"
    peers += " and not random and not coco512"
    basis = "20 entries of 1 s, KeOps and one formula compile in 10 s each"
    yield _bench("peers decoding", "second", "test_decode.py", peers, 80, 50, basis, dry, "cdist and ade512-0.3")
    peers, basis = (
        "XL and 4096 and bfloat16 and (eager or compile or ours)",
        "6 entries of 4 s, two compile in 20 s each",
    )
    yield _bench("peers field", "second", "test_neural_field.py", peers, 90, 60, basis, dry, "eager and 4 and XL")
    basis = "measured: 17 and 9 s for two of five entries, one compiles for longer"
    yield _bench("stack L/16", "second", "test_stack.py", "L/16", 120, 85, basis, dry, "sampling and eager")
    basis = "60 tests of 1 s, of which one compiles for 20 s"
    yield _tests("contract cuda", "second", "cuda", "test_contract.py", 80, 45, basis, dry, processes=4)
    yield _checker("memcheck", "cuda", "second", 60, 30, dry)


def _rest(dry):
    chosen, basis = "ours and many", "18 entries of 2 s"
    files = "test_correction.py test_decode.py"
    yield _bench("many classes", "rest", files, chosen, 90, 45, basis, dry, "many and interpolate and ours")
    chosen, basis = "not bfloat16 or not (4096 or 1024)", "64 entries of 2 s"
    yield _bench("field other sizes", "rest", "test_neural_field.py", chosen, 300, 150, basis, dry, "L-4")
    yield _bench("stack nano", "rest", "test_stack.py", "nano", 120, 60, "7 entries of 5 s", dry, "sampling and ours")
    chosen, short = "ours or eager or cdist", "search_by_classes and ours"
    yield _bench("scaling", "rest", "test_scaling.py", chosen, 300, 150, "70 entries of 1 s", dry, short)
    files, basis = "ops test_gpu.py test_contract.py", "some 400 kernels compile in 4 s in 12 processes"
    yield _tests("tests triton", "rest", "triton", files, 400, 200, basis, dry, processes=12)
    yield _checker("memcheck", "triton", "rest", 120, 60, dry)
    for backend in GPU_BACKENDS:
        name, basis = f"tests beyond 2^31 {backend}", "3 to 4 tests of 3 s on some 20 GB, one after another"
        yield _tests(name, "rest", backend, "test_gpu.py", 60, 20, basis, dry, chosen="two_to_the_31")
        yield _checker("racecheck", backend, "rest", 200, 120, dry)
        if not dry:
            yield _profile(backend)


def steps(dry=False):
    """All steps in order; `dry` gives the same steps on the CPU at tiny sizes."""
    return [*_first(dry), *_second(dry), *_rest(dry)]


def narrowed(step, only):
    """A bench step with only some of its entries; other steps as they are."""
    if not only or not step.bench:
        return step
    place = step.command.index("-k") + 1
    chosen = f"({step.command[place]}) and ({only})"
    return dataclasses.replace(step, command=(*step.command[:place], chosen, *step.command[place + 1 :]))


def table(found):
    """Lines of Markdown: the steps with their expected seconds, and the sums of the presets."""
    yield "| step | preset | expected, s | limit, s | basis |"
    yield "|---|---|---|---|---|"
    for step in found:
        yield f"| {step.name} | {step.preset} | {step.expected:g} | {step.limit:g} | {step.basis} |"
    for preset, budget in BUDGETS.items():
        expected = [step.expected for step in found if step.preset == preset]
        if expected:
            yield f"| all of `{preset}` | {preset} | {sum(expected):g} | {budget} | |"
