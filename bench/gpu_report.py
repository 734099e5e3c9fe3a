"""Test and time the kernels on a GPU, in steps that fit fifteen minutes; nothing is downloaded. `make gpu-report` runs it.

Each step is one process with a time limit; its log and results go to a folder. A second run into the same folder skips the steps
that are done, so an interrupted run continues. After each step the folder is packed into an archive of at most 16 MiB, which
`python -m bench gpu-import ARCHIVE` stores at home. docs/guides/gpu.md explains the steps.
"""

import argparse
import pathlib
import shutil
import sys
import time

from . import gpu_archive, gpu_steps, targets
from .results import ROOT, commit, groups_of, is_ours, rows_of
from .subprocesses import Interrupted, raise_on_signals, run_to_end

FOLDER = ROOT.parent / "build" / "gpu-report"
#: Folder of a dry run, so that its steps do not count as done on a GPU.
DRY_FOLDER = ROOT.parent / "build" / "gpu-report-dry"
#: Seconds below which no step is started.
SHORTEST = 5


class Report:
    """Runs steps and writes state.json, STEP.log, STEP.json and report.txt to one folder."""

    def __init__(self, folder, archive, budget, dry=False, only=""):
        self.folder, self.archive, self.dry = folder, archive, dry
        #: A step is done only if it ran with the same commit and selection, and on a GPU unless this is a dry run.
        self.run_as = {"commit": commit(), "only": only, "dry": dry}
        self.end = time.monotonic() + budget
        folder.mkdir(parents=True, exist_ok=True)
        self.state = gpu_archive.read_state(folder)

    def say(self, line):
        print(line, flush=True)
        with (self.folder / "report.txt").open("a") as file:
            file.write(line + "\n")

    def is_done(self, step):
        kept = self.state.get(step.name, {})
        return kept.get("ended") == "exit 0" and all(kept.get(key) == value for key, value in self.run_as.items())

    def run(self, step):
        """Run one step. Returns whether it passed."""
        left = min(step.limit, self.end - time.monotonic() - 2)
        if left < SHORTEST:
            self.say(f"left out  {step.name}: the time is used up")
            return False
        if not shutil.which(step.command[0]):
            self.say(f"left out  {step.name}: {step.command[0]} was not found")
            return False
        begin = time.monotonic()
        results, log = gpu_archive.next_files(self.folder, step.name)
        command = [*step.command, *([f"--benchmark-json={results}"] if step.bench else [])]
        ended, interrupted = run_to_end(command, left, step.environment, log)
        seconds = time.monotonic() - begin
        count = gpu_archive.slim(results) if step.bench else 0
        facts = {"ended": ended, "seconds": round(seconds, 1), "limit": step.limit, "entries": count}
        self.state[step.name] = {**facts, **self.run_as}
        gpu_archive.write_state(self.folder, self.state)
        if ended == "exit 5" and self.run_as["only"]:
            self.say(f"left out  {step.name}: --only {self.run_as['only']!r} leaves no entry of it")
            return True
        good = ended == "exit 0"
        entries = f", {count} entries" if step.bench else ""
        self.say(f"{'ok' if good else 'FAILED':8}  {step.name}: {ended}, {seconds:.0f} s{entries}")
        self.show(log, good)
        self.pack()
        if interrupted:
            raise interrupted
        return good

    def pack(self):
        """Write the archive. A failure is printed and ignored, because the folder has all files."""
        try:
            gpu_archive.pack(self.folder, self.archive)
        except OSError as error:
            self.say(f"no archive: {error}; everything is in {self.folder}")

    def show(self, log, good):
        """Print the last line of a step's log, more lines if it failed. The folder has the whole log."""
        lines = log.read_text(errors="replace").rstrip().splitlines()
        wrong = [line for line in lines if line.startswith(("WRONG", "FAILED", "ERROR"))][:30]
        for line in lines[-1:] if good else [*wrong, *lines[-12:]]:
            self.say(f"          {line[:600]}")

    def judge(self):
        """Print each measured group, the limits, and each target; a dry run judges no target."""
        rows = [row for result in gpu_archive.results_in(self.folder) for row in rows_of(result)]
        for name, members in groups_of(rows).items():
            shown = [f"{row['entry']} {row['ms']:.4g} ms{_share(row)}" for row in members.values() if "ms" in row]
            self.say(f"{name}: {', '.join(shown)}")
        for row in rows:
            if row["op"] == "machine":
                self.say(f"limit: {row['rate']:.4g} {row['entry']}")
        for target in () if self.dry else targets.GPU:
            measured, met = target.judge(groups_of(rows))
            if measured is not None:
                self.say(f"{'met' if met else 'missed':8} {target.what}: {target.shown(measured)} ({target.bound})")


def _share(row):
    share = f" {row['limit_ms'] / row['ms']:.0%}" if "limit_ms" in row else ""
    return share + (f" host {row['host_ms']:.2g}" if is_ours(row) and "host_ms" in row else "")


def chosen_steps(names, dry, only=""):
    """The steps of `names`, which are presets or steps. `only` selects entries of bench steps, like pytest's -k."""
    known = gpu_steps.steps(dry)
    every = {step.name for step in known} | set(gpu_steps.BUDGETS)
    unknown = [name for name in names if name not in every]
    if unknown or not names:
        wanted = ", ".join(f'"{name}"' for name in sorted(every))
        sys.exit(f"--steps: wanted names of {wanted}, between commas; got {', '.join(unknown) or 'none'}")
    chosen = [step for step in known if step.name in names or step.preset in names]
    return [gpu_steps.narrowed(step, only) for step in chosen]


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", default="first,second", help="comma-separated presets (first, second, rest) and steps"
    )
    parser.add_argument("--seconds", type=float, help="limit of the whole run (default: the budgets of the presets)")
    parser.add_argument("--folder", type=pathlib.Path, help="for logs, results and state (default build/gpu-report)")
    parser.add_argument("--archive", type=pathlib.Path, help="default FOLDER.tar.gz")
    parser.add_argument("--only", default="", help="select entries of bench steps, like pytest's -k")
    parser.add_argument("--again", action="store_true", help="also run steps that are done")
    parser.add_argument(
        "--dry-run", action="store_true", help="run every step on the CPU at tiny sizes; judges no time"
    )
    parser.add_argument("--list", action="store_true", help="show the steps and their expected seconds, and exit")
    given = parser.parse_args(arguments)
    given.names = [name.strip() for name in given.steps.split(",") if name.strip()]
    given.folder = given.folder or (DRY_FOLDER if given.dry_run else FOLDER)
    given.archive = given.archive or given.folder.with_name(given.folder.name + ".tar.gz")
    if given.seconds is None:
        given.seconds = sum(gpu_steps.BUDGETS.get(name, 0) for name in given.names) or max(gpu_steps.BUDGETS.values())
    if given.seconds <= SHORTEST:
        parser.error(f"--seconds: wanted more than {SHORTEST}; got {given.seconds:g}")
    for path in (given.folder, given.archive.parent):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"wanted a folder that can be made; got {path} ({error.strerror}); name another one")
    return given


def why_no_gpu():
    """None if torch sees a GPU, else the reason and the remedy."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; name an interpreter that has it: make gpu-report PYTHON=..."
    if torch.cuda.is_available():
        return None
    problem = "sees no GPU here" if torch.version.cuda else "is built without CUDA; install a CUDA build of it"
    return f"torch {torch.__version__} {problem}; `--dry-run` runs the steps on the CPU"


def main(arguments=None):
    given = parse(arguments)
    found = chosen_steps(given.names, given.dry_run, given.only)
    if given.list:
        print("\n".join(gpu_steps.table(found)))
        return 0
    begin = time.monotonic()
    reason = None if given.dry_run else why_no_gpu()
    if reason:
        print(f"gpu-report: {reason}")
        return 1
    left = given.seconds - (time.monotonic() - begin)
    report = Report(given.folder, given.archive, left, given.dry_run, given.only)
    raise_on_signals()
    good = True
    try:
        for step in found:
            if report.is_done(step) and not given.again:
                report.say(f"done      {step.name}")
                continue
            passed = report.run(step)
            good &= passed
            if step.vital and not passed:
                report.say(f"ended: every later step depends on {step.name}")
                break
    except Interrupted as interrupted:
        report.say(f"interrupted by {interrupted}: start again to continue")
        good = False
    report.judge()
    report.pack()
    print(f"{given.archive}: at home, store and render it: python -m bench gpu-import FILE")
    return 0 if good else 1
