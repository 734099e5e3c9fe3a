"""What the tests run through: python -m tests.coverage [pytest arguments]

Python lines by coverage.py, C++ lines by a build with gcov's counters. Writes docs/results/coverage.md. Lines that run only on a
GPU or in the Triton interpreter count as not run: the figures are those of one process of tests on a CPU.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from .native import ROOT, build

FOLDER = ROOT / "build" / "coverage"
RESULTS = ROOT / "docs" / "results" / "coverage.md"
TESTS = [
    "tests",
    "--ignore=tests/flowseg_kernels/cuda",
    "--ignore=tests/flowseg_kernels/static",
    "--ignore=tests/packaging",
]
HEAD = """# Coverage

`{}`: lines that the tests run through in one process on a CPU. Triton kernels, which
run in the interpreter's own process, and what needs a GPU count as not run.

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
    return {name: (f["summary"]["covered_lines"], f["summary"]["num_statements"]) for name, f in files.items()}


def native_lines() -> Lines:
    """A line of a header counts once, and as run when it ran in any of the objects that hold it."""
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


def main() -> int:
    library = build(FOLDER, "-O1 --coverage -fprofile-update=atomic", "--coverage")
    for old in (FOLDER / "objects").glob("*.gcda"):
        old.unlink()
    data = FOLDER / "python.data"
    environment = {**os.environ, "FLOWSEG_TEST_LIBRARY": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    tests = sys.argv[1:] or TESTS
    measured = ["--data-file", str(data), "--source", "flowseg_kernels,flowseg", "-m", "pytest"]
    command = [sys.executable, "-m", "coverage", "run", *measured, "-q", "-p", "tests.native", *tests]
    tested = subprocess.run(command, cwd=ROOT, env=environment)
    rows = []
    for kind, lines in (("Python", python_lines(data)), ("C++", native_lines())):
        ran, every = (sum(v[i] for v in lines.values()) for i in (0, 1))
        rows.append(f"| **{kind}** | **{ran}** | **{every}** | **{ran / max(every, 1):.1%}** |")
        rows += [f"| `{name}` | {r} | {n} | {r / max(n, 1):.1%} |" for name, (r, n) in folders(lines).items()]
    table = "\n".join(("| folder | lines run | lines | |", "|---|---|---|---|", *rows))
    print(table)
    RESULTS.write_text(f"{HEAD.format(' '.join(('python -m tests.coverage', *sys.argv[1:])))}{table}\n")
    return tested.returncode


if __name__ == "__main__":
    raise SystemExit(main())
