"""The steps of `make gpu-report`: what each runs, how long it may take, and how long it should take on an H100.

`first` says in at most 200 seconds what is right and how fast our own kernels are. `second` takes at most 400 seconds more: the
other tests, the peers, the whole stack, the memory checker. `rest` is for whoever owns a GPU.
"""

import dataclasses
import importlib.util
import os
import shutil
import sys

#: Seconds that each preset may take.
BUDGETS = {"first": 200, "second": 400, "rest": 1200}
GPU_BACKENDS = ("cuda", "triton")
#: What Nsight Compute says of each kernel.
SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    limit:     seconds after which it is stopped
    expected:  seconds that it should take on an H100 with 16 cores, and `basis` says why
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


def _workers():
    """Processes for tests, which spend their time compiling Triton kernels; without pytest-xdist one."""
    return ("-n", str(min(16, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()


def _bench(name, preset, files, chosen, limit, expected, basis, dry, short):
    """A step of `pytest bench`; a dry run takes the entries `short` on the CPU at tiny sizes."""
    environment = {"FLOWSEG_BENCH_DEVICE": "cpu" if dry else "cuda", **({"FLOWSEG_BENCH_QUICK": "1"} if dry else {})}
    command = _pytest(*(f"bench/{file}" for file in files.split()), "-k", short if dry else chosen, "--durations=15")
    return Step(name, preset, command, limit, expected, basis, environment, bench=True)


def _tests(name, preset, backend, limit, expected, basis, dry, large=False):
    """A step of the op tests on one backend. The folders cuda and static are left out: they need no GPU. Tests beyond 2^31
    elements take most of the memory, so they run by themselves."""
    folder = "tests/flowseg_kernels"
    if dry:
        command = _pytest("-k", "cpu and zero", f"{folder}/ops/test_distance_correction.py")
        return Step(name, preset, command, limit, expected, basis, {"FLOWSEG_REQUIRE_BACKENDS": "cpu"})
    chosen = f"{backend} and {'' if large else 'not '}two_to_the_31"
    files = ("test_gpu.py",) if large else ("test_gpu.py", "test_contract.py", "ops")
    where = [f"{folder}/{file}" for file in files]
    options = ("--few-forms", "--maxfail=40", "--durations=15", *(() if large else _workers()))
    command = _pytest("-k", chosen, *options, *where)
    return Step(name, preset, command, limit, expected, basis, {"FLOWSEG_REQUIRE_BACKENDS": backend})


def _checker(tool, backend, preset, limit, expected, dry):
    """One call of every op under compute-sanitizer, each allocation on its own: inside a block of torch's cache an overrun would
    touch memory that is allocated."""
    program = (
        shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        or "compute-sanitizer"
    )
    checker = (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only")
    # torch asks the driver for symbols that it may lack, which is no fault of a kernel.
    checker += ("--report-api-errors", "no") if tool == "memcheck" else ()
    run = (sys.executable, "-m", "bench.gpu_smoke", "calls", "--backend", "cpu" if dry else backend)
    command = (*run, "--device", "cpu") if dry else (*checker, *run)
    basis = "importing torch under the checker takes 15 s, kernels run up to 50 times as long"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(f"{tool} {backend}", preset, command, limit, expected, basis, environment)


def _profile(backend):
    """Every kernel's counters, at the benches' size, by Nsight Compute. The clocks stay as they are."""
    profiler = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "44")
    sections = [part for name in SECTIONS for part in ("--section", name)]
    command = (*profiler, *sections, sys.executable, "-m", "bench.gpu_smoke", "calls", "--large", "--backend", backend)
    return Step(f"profile {backend}", "rest", command, 120, 60, "44 launches, each run some 20 times")


def _smoke(name, what, backend, limit, expected, basis, dry):
    command = (sys.executable, "-m", "bench.gpu_smoke", what, "--backend", "cpu" if dry else backend)
    return Step(name, "first", command + (("--device", "cpu") if dry else ()), limit, expected, basis)


def _first(dry):
    load = (sys.executable, "-m", "bench.gpu_smoke", "load", *(("--device", "cpu") if dry else ()))
    yield Step("load", "first", load, 150, 10, "importing torch; 60 s more if the library has to be built", vital=True)
    yield _smoke("smoke cuda", "ops", "cuda", 40, 15, "importing torch, some 100 small calls", dry)
    yield _smoke("smoke triton", "ops", "triton", 60, 30, "as before, 20 kernels compile in 1 s each", dry)
    yield _smoke("field", "field", "triton", 60, 25, "24 kernels compile in 1 s each, fp64 on the GPU", dry)
    basis = "8 entries of 2 s, 8 kernels compile in 2 s each"
    own = "ours and bfloat16 and (4096 or 1024)"
    yield _bench("own field", "first", "test_neural_field.py", own, 70, 40, basis, dry, "ours and 4 and XL and float32")
    own = "limit or (ours and not without and not coco512)"
    basis = "66 entries of 0.7 s, checks included"
    short = "limit or (ours and ade512 and (correction or 0.3))"
    files = "test_limits.py test_correction.py test_decode.py"
    yield _bench("own pixel ops", "first", files, own, 90, 55, basis, dry, short)
    yield _tests("tests cuda", "first", "cuda", 60, 25, "no kernel compiles, 16 processes import torch", dry)


def _second(dry):
    yield _tests("tests triton", "second", "triton", 110, 60, "some 400 kernels compile in 2 s on 16 cores", dry)
    peers = "(eager or compile or KeOps) and not random"
    basis = "9 entries of 3 s, 3 compile in 10 s each"
    yield _bench("peers correction", "second", "test_correction.py", peers, 90, 50, basis, dry, "eager and ade512")
    peers = "(cdist or compiled or KeOps or flash or faiss or without or eager) and not random and not coco512"
    basis = "26 entries of 1 s, one compiles in 10 s"
    yield _bench("peers decoding", "second", "test_decode.py", peers, 80, 45, basis, dry, "cdist and ade512-0.3")
    peers = "XL and 4096 and bfloat16 and (eager or compile)"
    basis = "4 entries of 4 s, two compile in 20 s each"
    yield _bench("peers field", "second", "test_neural_field.py", peers, 100, 55, basis, dry, "eager and 4 and XL")
    basis = "5 entries of 10 s, one compiles in 20 s"
    yield _bench("stack L/16", "second", "test_stack.py", "L/16", 120, 75, basis, dry, "sampling and eager")
    for backend in GPU_BACKENDS:
        name, basis = f"tests beyond 2^31 {backend}", "3 to 4 tests of 3 s on some 20 GB"
        yield _tests(name, "second", backend, 40, 15, basis, dry, large=True)
    yield _checker("memcheck", "cuda", "second", 80, 35, dry)
    yield _checker("memcheck", "triton", "second", 80, 50, dry)


def _rest(dry):
    chosen = "not bfloat16 or not (4096 or 1024)"
    yield _bench(
        "field, other sizes", "rest", "test_neural_field.py", chosen, 300, 150, "64 entries of 2 s", dry, "L-4"
    )
    yield _bench("stack nano", "rest", "test_stack.py", "nano", 120, 60, "7 entries of 5 s", dry, "sampling and ours")
    chosen, short = "ours or eager or cdist", "search_by_classes and ours"
    yield _bench("scaling", "rest", "test_scaling.py", chosen, 300, 150, "70 entries of 1 s", dry, short)
    for backend in GPU_BACKENDS:
        yield _checker("racecheck", backend, "rest", 200, 120, dry)
        if not dry:
            yield _profile(backend)


def steps(dry=False):
    """All steps in order; `dry` gives the same steps on the CPU at tiny sizes."""
    return [*_first(dry), *_second(dry), *_rest(dry)]


def table(found):
    """Lines of Markdown: the steps with their expected seconds, and the sums of the presets."""
    yield "| step | preset | expected, s | limit, s | basis |"
    yield "|---|---|---|---|---|"
    for step in found:
        yield f"| {step.name} | {step.preset} | {step.expected:g} | {step.limit:g} | {step.basis} |"
    for preset, budget in BUDGETS.items():
        total = sum(step.expected for step in found if step.preset == preset)
        yield f"| all of `{preset}` | {preset} | {total:g} | {budget} | |"
