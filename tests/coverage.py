"""Lines that the tests execute: python -m tests.coverage [pytest arguments]

Python lines are counted by coverage.py, C++ lines by a build with gcov's counters. Writes docs/results/coverage.md unless arguments
are given. Triton kernels are left out. Lines that run only on a GPU, or in processes that a test starts, count as not run.
"""

from __future__ import annotations

import collections
import concurrent.futures
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from .native import ROOT, build
from .sources import commit

FOLDER = ROOT / "build" / "coverage"
RESULTS = ROOT / "docs" / "results" / "coverage.md"
#: Test runs, two at a time. Tests that execute no line of the library in their own process are left out: packaging, host shim,
#: machine code, benchmarks.
TESTS = [
    ["tests/flowseg_kernels/ops", "tests/fuzz"],
    ["tests/flowseg"],
    [
        "tests/flowseg_kernels/compose",
        *map(str, sorted((ROOT / "tests" / "flowseg_kernels").glob("test_*.py"))),
        # Its spawned workers load the installed library, which rounds differently from the build with counters.
        "--deselect=tests/flowseg_kernels/compose/test_processes.py::test_workers_of_a_data_loader_call_ops[spawn-1]",
    ],
]
HEAD = """# Coverage

`python -m tests.coverage`: lines of the library that its tests execute on a CPU, commit {}. Triton kernels, which run in the
interpreter, are left out. Lines that need a GPU, and lines that run only in a process that a test starts, count as not run.

"""
Lines = dict[str, tuple[int, int]]  # by file: (run, all)


def python_lines(data: pathlib.Path) -> Lines:
    command = [
        sys.executable,
        "-m",
        "coverage",
        "json",
        "-q",
        "--data-file",
        str(data),
        "-o",
        str(FOLDER / "python.json"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    files = json.loads((FOLDER / "python.json").read_text())["files"]
    return {
        name: (f["summary"]["covered_lines"], f["summary"]["num_statements"])
        for name, f in files.items()
        if "ops/" not in name or "triton" not in name
    }


def native_lines() -> Lines:
    """Lines of C++. A line of a header counts once, as run if it ran in any object file."""
    counts: dict[str, dict[int, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    with tempfile.TemporaryDirectory() as folder:
        for notes in (FOLDER / "objects").glob("*.gcda"):
            subprocess.run(["gcov", "--json-format", str(notes)], cwd=folder, check=True, capture_output=True)
        for report in pathlib.Path(folder).glob("*.gcov.json.gz"):
            for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
                path = pathlib.Path(file["file"]).resolve()
                if (ROOT / "csrc") in path.parents:
                    for line in file["lines"]:
                        counts[str(path.relative_to(ROOT))][line["line_number"]] += line["count"]
    return {name: (sum(n > 0 for n in lines.values()), len(lines)) for name, lines in counts.items()}


def folders(lines: Lines) -> dict[str, tuple[int, int]]:
    total: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for name, (ran, every) in sorted(lines.items()):
        folder = str(pathlib.Path(name).parent)
        total[folder] = total[folder][0] + ran, total[folder][1] + every
    return total


def run_tests(groups: list[list[str]], library: pathlib.Path) -> bool:
    environment = {**os.environ, "FLOWSEG_TEST_LIBRARY": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(number: int) -> int:
        data = ["--data-file", str(FOLDER / f"part.{number}"), "--source", "flowseg_kernels,flowseg"]
        command = [sys.executable, "-m", "coverage", "run", *data, "-m", "pytest", "-p", "tests.native"]
        begin = time.monotonic()
        done = subprocess.run([*command, *groups[number]], cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        print(f"{' '.join(groups[number][:2])}: {time.monotonic() - begin:.0f} s\n" + "\n".join(lines[-1:]), flush=True)
        if done.returncode:
            print("\n".join(lines[-60:]) + done.stderr[-2000:], flush=True)
        return done.returncode

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return not any(pool.map(run, range(len(groups))))


def main() -> int:
    begin = time.monotonic()
    library = build(FOLDER, "-O1 --coverage -fprofile-update=atomic", "--coverage")
    print(f"built in {time.monotonic() - begin:.0f} s", flush=True)
    for old in (*(FOLDER / "objects").glob("*.gcda"), *FOLDER.glob("part.*")):
        old.unlink()
    passed = run_tests([sys.argv[1:]] if sys.argv[1:] else TESTS, library)
    data = FOLDER / "python.data"
    parts = map(str, FOLDER.glob("part.*"))
    combine = [sys.executable, "-m", "coverage", "combine", "-q", "--data-file", str(data), *parts]
    subprocess.run(combine, cwd=ROOT, check=True)
    rows = []
    for language, lines in (("Python", python_lines(data)), ("C++", native_lines())):
        ran, every = (sum(v[i] for v in lines.values()) for i in (0, 1))
        rows.append(f"| **{language}** | **{ran}** | **{every}** | **{ran / max(every, 1):.1%}** |")
        rows += [f"| `{name}` | {r} | {n} | {r / max(n, 1):.1%} |" for name, (r, n) in folders(lines).items()]
    table = "\n".join(("| folder | lines run | lines | |", "|---|---|---|---|", *rows))
    print(table)
    if passed and not sys.argv[1:]:
        RESULTS.write_text(f"{HEAD.format(commit(RESULTS))}{table}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
