"""The long run: python -m tests.fuzz --backend cpu --cases 20000 [--minutes 3]

Writes tests/fuzz/record.json after every piece of a few hundred cases. A run that was stopped, or whose minutes were over, goes on
where it was when it is called again with the same seed; --anew starts over. Exit code 1 if any case ever failed in this run.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import platform
import subprocess
import time
import traceback

from .backends import prepare

RECORD = pathlib.Path(__file__).with_name("record.json")
PIECE = 250
#: Share of the cases by op. The field is slow and has no CUDA kernel.
SHARES = {
    "flow_interpolate": 3,
    "distance_correction": 5,
    "flow_loss": 5,
    "nearest_centroid": 4,
    "decode_confusion": 2,
    "neural_field": 1,
}


def plan(backend: str, cases: int) -> list[tuple[str, int]]:
    """(op, number of cases) of each piece, the ops in turn."""
    shares = {op: n for op, n in SHARES.items() if backend != "cuda" or op != "neural_field"}
    left = {op: -(-cases * n // sum(shares.values())) for op, n in shares.items()}
    pieces = []
    while any(left.values()):
        for op, n in left.items():
            if n:
                pieces.append((op, min(PIECE, n)))
                left[op] = n - pieces[-1][1]
    return pieces


def run_piece(op: str, backend: str, cases: int, seed: int) -> tuple[int, str | None]:
    """(cases that ran, the smallest failing one with its reason or None)."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from .cases import cases as strategy
    from .checks import check

    ran = 0

    @seeded(seed)
    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(strategy(op, slow=backend == "triton"))
    def every_case(case):
        nonlocal ran
        ran += 1
        check(op, case, backend)

    try:
        every_case()
    except Exception as error:
        return ran, "".join(traceback.format_exception_only(error)).strip()[-2000:]
    return ran, None


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else platform.machine()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RECORD.parent)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", required=True, choices=("reference", "cpu", "triton", "cuda"))
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these; call again to go on")
    parser.add_argument("--anew", action="store_true", help="forget the record of this backend")
    options = parser.parse_args()
    prepare(options.backend)
    import torch

    from .checks import seen

    every = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record = every.get(options.backend)
    wanted = {"seed": options.seed, "wanted": options.cases}
    if options.anew or record is None or {k: record[k] for k in wanted} != wanted:
        record = {
            **wanted,
            "cases": 0,
            "failures": 0,
            "pieces": 0,
            "seconds": 0.0,
            "numbers": 0,
            "numbers_free": 0,
            "failed": [],
        }
        record |= {"ops": {}, "commit": commit()}
    pieces = plan(options.backend, options.cases)
    end = time.monotonic() + 60 * options.minutes
    for number in range(record["pieces"], len(pieces)):
        if time.monotonic() > end:
            print(f"\n{len(pieces) - number} of {len(pieces)} pieces left: call again")
            break
        op, cases = pieces[number]
        seen.clear()
        start = time.process_time()
        ran, failed = run_piece(op, options.backend, cases, options.seed * 100_003 + number)
        counted = collections.Counter(record["ops"])
        counted[op] += ran
        record |= {
            "cases": record["cases"] + ran,
            "pieces": number + 1,
            "ops": dict(counted),
            "seconds": round(record["seconds"] + time.process_time() - start, 1),
            "numbers": record["numbers"] + seen["numbers"],
            "numbers_free": record["numbers_free"] + seen["free"],
            "commit_at_end": commit(),
            "machine": machine(),
            "torch": torch.__version__,
        }
        if failed:
            record["failures"] += 1
            record["failed"].append(f"{op}: {failed}")
            print(f"\n{op}: {failed}")
        # Other backends may be running beside this one.
        every = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(dict(sorted({**every, options.backend: record}.items())), indent=1) + "\n")
        done = (
            f"{record['cases']}/{options.cases} cases, {record['failures']} failures, {record['seconds']:.0f} s of CPU"
        )
        print(f"\r{options.backend}: {done}; last {op}      ", end="", flush=True)
    print()
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
