"""Workloads and the timing of one entry: inputs rotate so that no cache answers, correctness is asserted first.

On a CPU pytest-benchmark times the calls. On a GPU gpu_timing.py does, and the entry's extra_info carries the times.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import subprocess
import time

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.backend import backend_reasons

from . import gpu_timing, machine

#: name: (classes, factor on the spread of points around their codes)
WORKLOADS = {"ade512": (150, 1.0), "coco512": (171, 1.0), "many": (1000, 0.5)}
#: Tiny sizes, one round, no peer that compiles: shows that every entry still runs and is right, and judges no time.
QUICK = os.environ.get("FLOWSEG_BENCH_QUICK", "0") not in ("", "0")
SIZE = int(os.environ.get("FLOWSEG_BENCH_SIZE", "32" if QUICK else "512"))
DEVICE = os.environ.get("FLOWSEG_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16 if DEVICE == "cuda" else 1
SETS = 4
#: Rounds of the loops that measure the pipes.
PIPE_ROUNDS = 20_000 if QUICK else 2_000_000
#: Label maps: on a CPU a random class per pixel. On a GPU the main workloads have squares of one class each, as real maps have
#: regions, and a random class per pixel is a workload of its own, the worst case.
SQUARE = 32
#: Names for workloads(): on a GPU with the random label maps.
NAMES = (*WORKLOADS, "ade512 random") if DEVICE == "cuda" else tuple(WORKLOADS)
#: Entries of our own kernels; on a GPU each backend is one.
OURS = ("ours (cuda)", "ours (triton)") if DEVICE == "cuda" else ("ours",)


def label_map(classes, batch, size, square, generator):
    """(B, size, size) random classes; with `square`, of squares of that many pixels."""
    square = min(square or 1, size)
    few = torch.randint(0, classes, (batch, *[-(-size // square)] * 2), generator=generator, device=DEVICE)
    return few.repeat_interleave(square, 1).repeat_interleave(square, 2)[:, :size, :size].contiguous()


class Workload:
    """Rotating inputs of one workload: x near its codes, source, labels, times."""

    def __init__(self, name, classes, spread, *, channels=3, size=SIZE, batch=BATCH, spread_factor=1.0, square=None):
        # What is reported is the standard deviation that the points really have.
        self.name, self.spread, self.pixels = name, spread * spread_factor, batch * size * size
        self.classes, self.channels = classes, channels
        generator = torch.Generator(DEVICE).manual_seed(0)
        ignore = 255 if classes <= 255 else -1
        self.codebook = fk.Codebook(fk.kronecker_centroids(classes, channels), ignore_index=ignore).to(DEVICE)
        dtype = torch.uint8 if classes <= 255 else torch.int16 if classes <= 32767 else torch.int32
        self.label_dtype, self.sets = dtype, []
        shape = batch, channels, size, size
        for _ in range(SETS):
            classes_of = label_map(classes, batch, size, square, generator)
            noise = torch.randn(shape, generator=generator, device=DEVICE)
            source = torch.rand(shape, generator=generator, device=DEVICE) * 2 - 1
            inputs = {
                "x": self.codebook.encode(classes_of) + self.spread * noise,
                "source": source,
                "labels": classes_of.to(dtype),
                "t": torch.rand(batch, generator=generator, device=DEVICE),
            }
            self.sets.append(inputs)

    def rotate(self):
        return itertools.cycle(self.sets)


@pytest.fixture(scope="session")
def workloads():
    """workloads(name, spread): a Workload, made once."""
    made = {}

    def get(name, spread=0.3):
        if (name, spread) not in made:
            if DEVICE == "cuda":
                made.clear()  # one workload is several GB with its peers' forms of the labels
            classes, factor = WORKLOADS[name.removesuffix(" random")]
            square = SQUARE if DEVICE == "cuda" and not name.endswith(" random") else None
            made[name, spread] = Workload(name, classes, spread, spread_factor=factor, square=square)
        return made[name, spread]

    return get


def median_seconds(run, rounds=9):
    """Median time of run() on a CPU, for figures that are no entry of their own."""
    times = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times[2:])[rounds // 2]


@pytest.fixture(scope="session")
def limits():
    """What this machine gives in this run, a second: bytes copied (read and written), operations of its multiply pipes and of
    fp32 and bf16 matrix products."""
    if DEVICE == "cuda":
        return gpu_timing.limits(QUICK)
    planes = [torch.rand(BATCH, 3, SIZE, SIZE) for _ in range(2 * SETS)]
    turn = itertools.cycle(range(SETS))

    def copy():
        i = next(turn)
        planes[SETS + i].copy_(planes[i])

    n = 128 if QUICK else 1024
    found = {"copy": 2 * 4 * planes[0].numel() / median_seconds(copy, 31)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
        found[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b)
    fma = machine.multiply_adds(torch.get_num_threads(), PIPE_ROUNDS)
    # Without a compiler a matrix product in fp32 stands for the multiply pipes.
    found["multiply"] = 2 * fma if fma else found["fp32"]
    return found


def pairs_a_second(channels):
    """Pairs of a pixel and a class of the correction's bare arithmetic, on all threads; None where it cannot be measured."""
    return machine.pairs(channels, torch.get_num_threads(), PIPE_ROUNDS) if DEVICE == "cpu" else None


def backend_name(entry):
    return entry.partition("(")[2].partition(")")[0]


@contextlib.contextmanager
def backend_of(entry):
    """The backend that an entry of OURS names; the automatic one for the others."""
    name = backend_name(entry)
    with fk.use_backend(name) if name else contextlib.nullcontext():
        yield


def cpu_times(benchmark, call, inputs, rounds):
    """Let pytest-benchmark time call(inputs); returns the peak memory in MiB, None where it cannot be measured."""
    call(next(inputs))
    begin = time.perf_counter()
    peak = machine.peak_mib(lambda: call(next(inputs)), DEVICE)
    once = max(time.perf_counter() - begin, 1e-6)
    rounds = 1 if QUICK else rounds or max(5, min(201, int(1.5 / once)))
    benchmark.extra_info["asked"] = rounds
    # The calls above have warmed up what takes long.
    warmup = 0 if QUICK or once > 0.3 else 3
    benchmark.pedantic(call, setup=lambda: ((next(inputs),), {}), rounds=rounds, warmup_rounds=warmup)
    return peak


def gpu_times(benchmark, entry, run, sets, graph):
    """Time run(inputs) by CUDA events into the entry's extra_info; returns the peak memory in MiB."""
    with backend_of(entry):
        run(sets[0])
        peak = machine.peak_mib(lambda: run(sets[-1]), DEVICE)
        found = gpu_timing.call_times(run, sets, graph=graph and not entry.startswith(("KeOps", "faiss")))
        kernels = gpu_timing.kernel_times(run, sets[:2])
    benchmark.extra_info.update(found, kernels=kernels)
    benchmark.pedantic(lambda: None, rounds=1)
    return peak


@pytest.fixture
def measure(benchmark, limits):
    """measure(run, workload, op, entry): times run(inputs) over rotating inputs and records what it was.

    moved: bytes that the op has to read and write. operations: those of the multiply pipes, 2 for a fused multiply-add; rate: the
    limit that they are held against. pairs: those of a pixel and a class, whose arithmetic as a whole is measured on a CPU, right
    before and after the entry, and then counts instead of the operations. The limit is the longer of moving and computing at the
    rates measured in this run. graph: on a GPU the entry may be timed inside a CUDA graph.
    """

    def call(
        run,
        workload,
        op,
        entry,
        *,
        rounds=None,
        spread=False,
        variant="",
        moved=0,
        operations=0,
        pairs=0,
        rate="multiply",
        graph=True,
        **info,
    ):
        def in_backend(i):
            with backend_of(entry):
                return run(i)

        name = workload.name + (f" {variant}" if variant else "")
        benchmark.group = f"{op} {name}" + (f" spread {workload.spread:g}" if spread else "")
        benchmark.extra_info.update(
            op=op,
            workload=name,
            spread=workload.spread,
            entry=entry,
            pixels=getattr(workload, "pixels", SIZE * SIZE),
            **info,
        )
        rates = [pairs_a_second(workload.channels)] if pairs else []
        if DEVICE == "cuda":
            peak = gpu_times(benchmark, entry, run, workload.sets, graph)
        else:
            peak = cpu_times(benchmark, in_backend, workload.rotate(), rounds)
        if peak is not None:
            benchmark.extra_info["peak_mib"] = peak
        if moved or operations:
            rates += [pairs_a_second(workload.channels)] if pairs else []
            # The better of the two is the machine; the other one was disturbed.
            computing = pairs / max(rates) if all(rates) and rates else operations / limits[rate]
            limit = max(moved / limits["copy"], computing)
            benchmark.extra_info.update(moved=moved, operations=operations, limit_ms=limit * 1e3)

    return call


def gpu_tools():
    """Versions of what turns our sources into a GPU's code and runs it: driver, Triton, and the nvcc of our library."""
    found = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    facts = pathlib.Path(fk.__file__).parent / "lib" / "libflowseg_cuda.json"
    if facts.exists():
        found["nvcc"] = json.loads(facts.read_text())["compiler"]
    return found


def pytest_benchmark_update_machine_info(config, machine_info):
    facts = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    model = next((line.split(":")[1].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    info = {"model": model or platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if DEVICE == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **gpu_tools()}
    machine_info.clear()
    machine_info.update(
        info, flowseg_kernels=fk.__version__, python=platform.python_version(), system=platform.system()
    )
    if DEVICE == "cpu" and fk.available_backends("flow_loss")[0] == "cpu":
        machine_info["instruction_set"] = ("baseline", "avx2", "avx512")[torch.ops.flowseg_cpu.instruction_set()]


def pytest_benchmark_update_commit_info(config, commit_info):
    """Dirty: sources differ from the commit. What a run itself writes, its results and what is rendered of them, is no source.

    FLOWSEG_BENCH_COMMIT names the commit of a copy without git, with "-dirty" after it where its sources differ.
    """
    given = os.environ.get("FLOWSEG_BENCH_COMMIT")
    if given:
        commit_info.update(id=given.removesuffix("-dirty"), dirty=given.endswith("-dirty"))
        return
    written = ("bench/results", "README.md", "docs/images", "docs/results")
    query = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in written)]
    commit_info["dirty"] = True
    with contextlib.suppress(OSError):  # without git nothing is known
        asked = subprocess.run(query, cwd=config.rootpath, capture_output=True, text=True)
        commit_info["dirty"] = asked.returncode != 0 or bool(asked.stdout.strip())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Where a run is cut, the entry that it was at has no times, and pytest-benchmark could write none of the others."""
    kept = getattr(session.config, "_benchmarksession", None)
    if kept:
        kept.benchmarks[:] = [entry for entry in kept.benchmarks if entry.stats.data]


def peer(module):
    """The module of a peer, or a skip that says it is not installed."""
    return pytest.importorskip(module, reason=f"{module} is not installed; `make bench` installs it")


def skip_unless_it_runs(entry, op="flow_loss"):
    """Skip, with the reason, an entry that this run leaves out or that cannot run here."""
    if QUICK and entry in ("torch.compile", "KeOps", "cdist+argmin compiled"):
        pytest.skip("the short form leaves out peers that compile")
    if DEVICE == "cuda" and entry in ("faiss IndexFlatL2", "scipy cKDTree", "Pillow quantize"):
        pytest.skip("runs on a CPU only")
    name = backend_name(entry)
    if name and (reason := backend_reasons(op, DEVICE)[name]):
        pytest.skip(f"{name}: {reason}")
