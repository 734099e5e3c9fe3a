"""Check that the tests see bugs: python -m tests.mutation [--only WORD]

For each planted bug: changes a copy of the tree, rebuilds it and runs the tests of the changed code. Prints the test that failed
first and writes docs/results/mutation.md. The exit code is 1 if a bug survives, if a plant no longer matches the code, or if the
tests fail without a bug.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from ..native import ROOT, build
from ..sources import commit
from .plants import PLANTS, Plant

COPY = ROOT / "build" / "mutated"
RESULTS = ROOT / "docs" / "results" / "mutation.md"
HEAD = """# Planted bugs

`python -m tests.mutation` plants typical kernel bugs in a copy of the tree, one at a time, rebuilds the copy and runs the tests of
the changed code. "Seen by" is the first test that failed. Without a bug all of these tests pass.

| bug | language | planted in | seen by | commit |
|---|---|---|---|---|
"""


def copy_tree(to: pathlib.Path) -> None:
    """Copy every file that git tracks or does not ignore. Build outputs of an earlier copy stay."""
    to.mkdir(parents=True, exist_ok=True)
    for entry in to.iterdir():
        if entry.name != "build":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def build_library(root: pathlib.Path) -> None:
    # One instruction set and little optimisation compile faster; the tests are the same.
    library = build(root / "build" / "mutation", "-O1", root=root, sets=False)
    shutil.copy2(library, root / "flowseg_kernels" / "lib" / library.name)
    shutil.copy2(library.with_suffix(".json"), root / "flowseg_kernels" / "lib" / f"{library.stem}.json")


def run_tests(root: pathlib.Path, plant: Plant) -> tuple[int, list[str], str]:
    """Run the tests of a plant in the tree `root`. Returns (exit code, failed tests, output)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment |= {"FLOWSEG_REQUIRE_BACKENDS": "cpu"}
    if plant.language == "Triton":
        environment |= {"TRITON_INTERPRET": "1", "FLOWSEG_REQUIRE_BACKENDS": "triton"}
    if plant.language == "CUDA":
        environment |= {"FLOWSEG_REQUIRE_BACKENDS": "cuda"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-rf",
        "--durations=0",
        "-p",
        "no:cacheprovider",
        *plant.tests,
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    # An ERROR of a fixture or of the collection does not count: no test has seen a wrong result.
    failed = re.findall(r"^FAILED (\S+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed, done.stdout[-4000:] + done.stderr[-1000:]


def check(root: pathlib.Path, plant: Plant, native: bool) -> tuple[str | None, str]:
    """Plant a bug in the tree `root` and remove it again. Returns (the test that saw it or None, the reason for None)."""
    code, _, output = run_tests(root, plant)
    if code:
        return None, f"the tests fail without the bug:\n{output}"
    try:
        before = plant.apply(root)
    except ValueError as error:
        return None, str(error)
    try:
        if native:
            build_library(root)
        code, failed, output = run_tests(root, plant)
    finally:
        (root / plant.path).write_text(before)
        if native:
            # A newer file is compiled again: the next plant must not link this plant's objects.
            os.utime(root / plant.path)
    if code == 0:
        return None, "it survived"
    return (failed[0], "") if failed else (None, output)


def stored_rows() -> dict[str, str]:
    """The rows of the stored table by bug. A run of some plants keeps the rows of the others."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="run only the plants whose bug or language contains WORD", metavar="WORD"
    )
    only = parser.parse_args().only
    chosen = [p for p in PLANTS if only.lower() in f"{p.bug} {p.language}".lower()]
    rows, survived, start = stored_rows(), 0, time.monotonic()
    copy_tree(COPY)
    if any(plant.language in ("C++", "Python") for plant in chosen):
        build_library(COPY)
    print(f"copied and built in {time.monotonic() - start:.0f} s", flush=True)
    for plant in chosen:
        began = time.monotonic()
        seen_by, why_not = check(COPY, plant, native=plant.language == "C++")
        survived += seen_by is None
        test = seen_by.removeprefix("tests/").removeprefix("flowseg_kernels/") if seen_by else f"NOT SEEN: {why_not}"
        print(f"{plant.bug:26} {plant.language:7} {time.monotonic() - began:4.0f} s  {test}", flush=True)
        rows[plant.bug] = (
            f"| {plant.bug} | {plant.language} | `{plant.path}` | `{test.splitlines()[0]}` | {commit(RESULTS)} |"
        )
        in_order = [rows[p.bug] for p in PLANTS if p.bug in rows]
        RESULTS.write_text(f"{HEAD}{chr(10).join(in_order)}\n")
    print(f"{len(chosen) - survived} of {len(chosen)} bugs were seen, in {time.monotonic() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
