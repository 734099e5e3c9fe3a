"""The long fuzz run: python -m tests.fuzz --backend cpu --cases 20000 [--minutes 3]

Each piece of a few hundred cases is stored in tests/fuzz/record.json. A run that was interrupted, or that used up its minutes,
continues when it is called again at the same commit with the same torch and seed; --again starts over. The exit code is 1 if any
case of the run failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import time

from flowseg.runs.machine import cpu_model

from ..sources import commit, is_known
from .backends import prepare
from .pieces import Piece, run_piece

RECORD = pathlib.Path(__file__).with_name("record.json")
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "results" / "fuzz.md"
HEAD = """# Random calls

`python -m tests.fuzz --backend NAME --cases 20000` calls the ops at random and compares results and gradients with fp64.
The calls cover sizes from 0, every memory layout, dtype and option, NaN, infinities, ties, and points on cell borders of the decode
grid. Each number of a per-pixel op must lie within an error bound that follows from the formulas (`tests/fuzz/exact.py`).
For `neural_field` the norms of the output and of the gradients must agree within 40 times the effect of rounding the inputs.

- **Unbounded**: the share of numbers without a bound, which are not compared. Either an intermediate result leaves the range of its
  dtype, or the rounding of the inputs decides which code is nearest.
- **Changed codebooks** (`--changed`): before each call the tensors of a codebook are overwritten, replaced, averaged, cast or
  invalidated. The result must be that of the changed codes, or an error.
- Each row is one run; a row below 20,000 calls is unfinished. Calls that once failed are tests now (`tests/fuzz/test_fuzz.py`).

| backend | calls | failures | numbers | unbounded | CPU seconds | seed | commit | torch | machine |
|---|---|---|---|---|---|---|---|---|---|
"""
TORCH = importlib.metadata.version("torch")
PIECE = 250
#: Environment variable that names the sanitizer of this process.
UNDER = "FLOWSEG_EMULATED_SANITIZER"
HOW = {"triton": " (interpreted)", "cuda": " (on the host shim)"}
#: Relative number of cases per op. The field gets few, because it is slow.
SHARES = {
    "flow_interpolate": 3,
    "distance_correction": 5,
    "flow_loss": 5,
    "nearest_centroid": 4,
    "decode_confusion": 2,
    "class_probabilities": 2,
    "top_classes": 2,
    "neural_field": 1,
}


def plan(cases: int, changed: bool = False) -> list[tuple[str, int]]:
    """(op, number of cases) of each piece; the ops take turns."""
    shares = {op: n for op, n in SHARES.items() if op != "neural_field" or not changed}
    left = {op: -(-cases * n // sum(shares.values())) for op, n in shares.items()}
    pieces = []
    while any(left.values()):
        for op, n in left.items():
            if n:
                pieces.append((op, min(PIECE, n)))
                left[op] = n - pieces[-1][1]
    return pieces


def report(records: dict) -> str:
    """The page docs/results/fuzz.md of these records."""
    rows = []
    for name, r in records.items():
        free = r["numbers_free"] / max(r["numbers"], 1)
        counts = f"{r['cases']:,} | {r['failures']} | {r['numbers']:,} | {free:.2%} | {r['seconds']:.0f}"
        where = f"{r['seed']} | {r['commit']} | {r['torch']} | {r['machine']}"
        backend, *more = name.split(" ")
        how = {"changed": ", changed codebooks", "address": ", under AddressSanitizer"}
        # The neural field has no codebook to change.
        without = "" if "neural_field" in r["ops"] or "changed" in more else ", without `neural_field`"
        title = f"{backend}{HOW.get(backend, '')}{''.join(how[word] for word in more)}{without}"
        rows.append(f"| {title} | {counts} | {where} |")
    return HEAD + "\n".join(rows) + "\n"


def store(backend: str, record: dict, piece: Piece) -> None:
    """Add a piece to the record of a backend; write record and page."""
    record["ops"][piece.op] = record["ops"].get(piece.op, 0) + piece.ran
    record |= {
        "cases": record["cases"] + piece.ran,
        "pieces": record["pieces"] + 1,
        "failures": record["failures"] + (piece.failed is not None),
        "failed": record["failed"] + ([f"{piece.op}: {piece.failed}"] if piece.failed else []),
        "seconds": round(record["seconds"] + piece.seconds, 1),
        "numbers": record["numbers"] + piece.seen.get("numbers", 0),
        "numbers_free": record["numbers_free"] + piece.seen.get("free", 0),
        "machine": cpu_model() or platform.machine(),
    }
    # Read the file again: runs of other backends may write it at the same time.
    every = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    every = dict(sorted({**every, backend: record}.items()))
    RECORD.write_text(json.dumps(every, indent=1) + "\n")
    RESULTS.write_text(report(every))


def under_sanitizer(options: argparse.Namespace) -> int:
    """Run this command again with kernels that are compiled with a sanitizer."""
    from ..sanitize.__main__ import compiled, prepared

    name = options.sanitizer
    if options.backend == "cpu":
        compiled(name)
    command, environment = prepared(name, "-m", "tests.fuzz", *sys.argv[1:])
    return subprocess.run(command, env={**environment, UNDER: name}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", required=True, choices=("reference", "cpu", "triton", "cuda"))
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this time; call again to continue"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--changed", action="store_true", help="change the codebook's tensors before each call")
    parser.add_argument(
        "--sanitizer",
        choices=("address",),
        help="compile the kernels of cpu or cuda with it; the run gets its own record",
    )
    parser.add_argument("--again", action="store_true", help="drop the record of this backend and start over")
    options = parser.parse_args()
    if options.sanitizer and not os.environ.get(UNDER):
        return under_sanitizer(options)
    every = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    name = " ".join(filter(None, (options.backend, options.changed and "changed", options.sanitizer)))
    record = every.get(name)
    # A record of other sources, another torch or other options does not count.
    wanted = {"seed": options.seed, "wanted": options.cases, "commit": commit(RECORD, RESULTS), "torch": TORCH}
    known = record is not None and is_known(wanted["commit"])
    if options.again or not known or {k: record.get(k) for k in wanted} != wanted:
        record = {**wanted, "cases": 0, "failures": 0, "pieces": 0, "seconds": 0.0, "numbers": 0, "numbers_free": 0}
        record |= {"failed": [], "ops": {}}
    pieces = [
        Piece(op, options.backend, cases, options.seed * 100_003 + number, options.changed)
        for number, (op, cases) in enumerate(plan(options.cases, options.changed))
    ]
    if record["pieces"] >= len(pieces):
        print(f"{options.backend}: {record['cases']} cases are done at {record['commit']}; --again runs them again")
    if options.backend == "cuda":
        prepare("cuda")  # compiles the kernels once, before the processes start
    end = time.monotonic() + 60 * options.minutes
    with multiprocessing.get_context("spawn").Pool(options.jobs, prepare, (options.backend,)) as pool:
        for piece in pool.imap(run_piece, pieces[record["pieces"] :]):
            store(name, record, piece)
            done = f"{record['cases']}/{options.cases} cases, {record['failures']} failures, {record['seconds']:.0f} s of CPU"
            print(f"\r{options.backend}: {done}; last {piece.op}      ", end="", flush=True)
            if piece.failed:
                print(f"\n{piece.op}: {piece.failed}")
            left = len(pieces) - record["pieces"]
            if left and time.monotonic() > end:
                print(f"\n{left} of {len(pieces)} pieces left: call again to continue")
                break
    print()
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
