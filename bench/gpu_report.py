"""`make gpu-report`: everything that only a machine with a GPU can tell, in under nine minutes, with nothing to download.

Builds the kernels in place with the interpreter that runs this, tests each GPU backend, sanitizes a short set, measures, and
stores bench/results/GPU/. Every step has its own share of the time and what earlier ones left of theirs; one that fails, is
missing or runs out of time is named and the next one starts. What was measured is stored after each step, so a run that is cut
short keeps what it has; at the end README and pictures are rendered. `--dry-run` goes through the same steps on the CPU at tiny
sizes.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
import time

import torch

from tests.flowseg_kernels.static.sass import find_tool

from . import report, targets
from .child import Cut, carry_out, cut_on_signals
from .results import RESULTS, ROOT, best_of_ours, groups_of, load, store

#: Seconds for the whole run.
BUDGET = 530
GPU_BACKENDS = ("cuda", "triton")
#: One call of every op at a size that a sanitizer gets through, odd sides included.
SHORT_SET = """
import sys, torch, flowseg_kernels as fk
backend, device = sys.argv[1:]
codebook = fk.Codebook(fk.kronecker_centroids(150, 3)).to(device)
labels = torch.randint(0, 150, (2, 37, 29), dtype=torch.uint8, device=device)
x = torch.randn(2, 3, 37, 29, device=device)
with fk.use_backend(backend):
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.rand(2, device=device)
        leaf = x.to(dtype).requires_grad_()
        fk.flow_loss(leaf, x.to(dtype), labels, t, codebook).backward()
        fk.distance_correction(x.to(dtype), labels, codebook)
        fk.flow_interpolate(x.to(dtype), labels, t, codebook)
        fk.nearest_centroid(x.to(dtype), codebook)  # by the grid
        fk.nearest_centroid(x.to(dtype), codebook, return_margin=True)
        fk.decode_confusion(x.to(dtype), labels, codebook)
        if backend in fk.available_backends("neural_field", device):
            decoder = fk.NeuralFieldDecoder(32).to(device, dtype)
            features = torch.randn(2, 2, 32, device=device, dtype=dtype)
            decoder(x[:, :, :32, :16].to(dtype), features).square().sum().backward()
if device == "cuda":
    torch.cuda.synchronize()
"""


@dataclasses.dataclass
class Step:
    """One command: seconds is its share of the whole; bench steps write a pytest-benchmark file that is stored."""

    name: str
    command: list
    seconds: float
    environment: dict = dataclasses.field(default_factory=dict)
    bench: bool = False


def steps(dry):
    """All steps, the ones that others depend on and the cheapest proof first."""
    python, root = sys.executable, ROOT.parent
    device = "cpu" if dry else "cuda"
    backends = ("cpu",) if dry else GPU_BACKENDS
    # By name, so that a CUDA kernel that does not compile fails here instead of being left out.
    build = {"FLOWSEG_BUILD": "cpu" if dry else "cuda"}
    if not dry and torch.cuda.is_available():
        build["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    yield Step("build", [python, "setup.py", "-q", *(["--version"] if dry else ["build_ext", "--inplace"])], 120, build)
    yield Step("info", [python, "-m", "flowseg_kernels.info"], 10)
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    for backend in backends:
        wanted = (
            ["-k", f"{backend} and zero"]
            if dry
            else ["-k", f"{backend} or every_required", "--few-forms", "--maxfail=20"]
        )
        # Not the folders cuda and static: they emulate and count, and need no GPU.
        names = ("ops/test_distance_correction.py",) if dry else ("test_gpu.py", "test_contract.py", "ops")
        where = [f"tests/flowseg_kernels/{name}" for name in names]
        where += [] if dry else ["tests/test_last.py"]
        yield Step(f"tests on {backend}", [*pytest, *wanted, *where], 65, {"FLOWSEG_REQUIRE_BACKENDS": backend})

    def bench(name, files, seconds, short):
        """short: the entries that a dry run keeps."""
        here = [f"bench/{file}" for file in files.split() if (root / "bench" / file).exists()]
        environment = {"FLOWSEG_BENCH_DEVICE": device, **({"FLOWSEG_BENCH_QUICK": "1"} if dry else {})}
        command = [*pytest, *here, *(["-k", short] if dry else [])]
        return Step(name, command, seconds, environment, bench=True) if here else None

    yield bench("bench: correction", "test_limits.py test_correction.py", 70, "limit or ade512 and correction")
    yield bench("bench: decoding", "test_decode.py", 50, "ade512-0.3")
    yield bench("bench: neural field", "test_neural_field.py", 45, "ours")
    for backend in backends:
        # Without the tool the two are the same.
        for tool in ("memcheck",) if dry else ("memcheck", "racecheck"):
            program = find_tool("compute-sanitizer") or "compute-sanitizer"
            sanitizer = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
            # torch asks the driver for symbols that it may lack, which is no fault of a kernel.
            sanitizer += ["--report-api-errors", "no"] if tool == "memcheck" else []
            # Within a block of torch's cache an overrun would touch memory that is allocated.
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [*([] if dry else sanitizer), python, "-c", SHORT_SET, backend, device]
            yield Step(f"{tool} on {backend}", command, 12, uncached)
    short = "sampling and eager or search_by_classes and ours"
    yield bench("bench: stack and scaling", "test_stack.py test_scaling.py", 45, short)
    # From what was just stored; a dry run has no times of a GPU, and only says what it would write.
    yield Step("preferences", [python, "-m", "bench.preferences", *(["--show"] if dry else [])], 8)


class Run:
    """Carries the steps out and writes down how each ended."""

    def __init__(self, results, dry, budget):
        self.results, self.dry, self.end = results, dry, time.monotonic() + budget
        self.lines, self.folder = [], None
        # Until here the steps that were started may run: their shares together, from the start.
        self.until = time.monotonic()

    def say(self, line):
        print(line, flush=True)
        self.lines.append(line)
        folder = self.folder or self.results
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu_report.txt").write_text("\n".join(self.lines) + "\n")

    def carry_out(self, step):
        begin = time.monotonic()
        self.until += step.seconds
        left = min(self.until, self.end - 10) - begin
        if left < 5:
            return self.say(f"left out  {step.name}: the time is used up")
        if not shutil.which(step.command[0]):
            return self.say(f"left out  {step.name}: {step.command[0]} was not found")
        with tempfile.TemporaryDirectory() as scratch:
            measured, log = pathlib.Path(scratch) / "bench.json", pathlib.Path(scratch) / "log"
            command = [*step.command, *([f"--benchmark-json={measured}"] if step.bench else [])]
            ended, cut = carry_out(command, left, step.environment, log)
            text = log.read_text(errors="replace").rstrip().splitlines()
            if step.bench and measured.exists() and measured.stat().st_size:
                self.keep(json.loads(measured.read_text()))
            self.say(
                f"{'ok' if ended == 'exit 0' else 'FAILED':8}  {step.name}: {ended}, {time.monotonic() - begin:.0f} s"
            )
            # A name a line where a step prints little; the end of the log where it failed.
            shown = text[-40:] if ended != "exit 0" or step.name == "info" else text[-1:]
            self.say("\n".join(f"          {line[:200]}" for line in shown))
            if cut:
                raise cut

    def keep(self, result):
        if not result["benchmarks"]:
            return
        self.folder = store(result, self.results)
        self.say(f"          {len(result['benchmarks'])} entries stored in {self.folder.name}")

    def judge(self):
        """What was measured, and each target beside it."""
        stored = load(self.folder) if self.folder else None
        if not stored:
            return self.say("No figure was measured.")
        for line in figures(stored["rows"]):
            self.say(line)
        groups = groups_of(stored["rows"])
        for target in targets.GPU:
            measured, met = target.judge(groups)
            verdict = {None: "", True: "met", False: "missed"}[None if self.dry else met]
            self.say(f"{verdict:8} {target.what}: {target.shown(measured)} ({target.bound})")

    def render(self, readme):
        """README and pictures; a machine without matplotlib gets the text alone."""
        if not self.folder:
            return
        try:
            report.write(readme, self.results, readme.parent / "docs" / "images")
        except ImportError as error:
            report.write(readme, self.results, None)
            self.say(f"no pictures: {error}")
        self.say(f"rendered  {readme.name}")


def figures(rows):
    """A line for each group of ours."""
    for name, members in groups_of(rows).items():
        ours = best_of_ours(members)
        if not ours:
            continue
        facts = [f"{ours['entry']} {ours['ms']:.4g} ms"]
        facts += [f"in a graph {ours['graph_ms']:.4g} ms"] if "graph_ms" in ours else []
        facts += [f"no graph: {ours['graph_error']}"] if "graph_error" in ours else []
        facts += [f"peak {ours['peak_mib']:.0f} MiB"] if "peak_mib" in ours else []
        if "limit_ms" in ours:
            facts.append(f"{ours['limit_ms'] / ours.get('graph_ms', ours['ms']):.0%} of the limit")
        facts += [f"{peer} {members[peer]['ms'] / ours['ms']:.3g}x" for peer in report.PEERS if peer in members]
        yield f"{name}: {', '.join(facts)}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU at tiny sizes; judges no time")
    parser.add_argument(
        "--results", type=pathlib.Path, help="folder of results (default bench/results; a dry run: a temporary one)"
    )
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"for the whole run (default {BUDGET})")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("gpu-report: torch sees no GPU here; `--dry-run` goes through the steps on the CPU")
        return 1
    results = given.results or (pathlib.Path(tempfile.mkdtemp()) if given.dry_run else RESULTS)
    readme = ROOT.parent / "README.md"
    if given.dry_run:
        (results / "docs" / "images").mkdir(parents=True, exist_ok=True)
        readme = pathlib.Path(shutil.copy(readme, results))
    cut_on_signals()
    run = Run(results, given.dry_run, given.seconds)
    try:
        for step in filter(None, steps(given.dry_run)):
            run.carry_out(step)
    except Cut as error:
        run.say(f"cut by {error}")
    run.judge()
    run.render(readme)
    return 1 if any(line.startswith("FAILED") for line in run.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
