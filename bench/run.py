"""Time all of `pytest bench/` in parts; store and render the results of each part as soon as it ends.

Each part is one pytest process. A run that was interrupted, or stopped by `--seconds`, continues at the same commit when it is
started again. The last part drops stored rows that nothing measures any more, and the next run measures everything again.
"""

import argparse
import json
import pathlib
import sys
import time

from . import report
from .results import RESULTS, ROOT, commit, keep_only, machine_name, rows_of, store
from .subprocesses import Interrupted, raise_on_signals, run_to_end

#: name: (file, pytest's -k). Each part is shorter than ten minutes. A test checks that every entry is in exactly one part.
PARTS = {
    "limits": ("test_limits.py", ""),
    "correction": ("test_correction.py", "test_distance_correction"),
    "loss": ("test_correction.py", "not test_distance_correction"),
    "decoding": ("test_decode.py", "not many"),
    "decoding, many classes": ("test_decode.py", "many"),
    "scaling of the correction": ("test_scaling.py", "correction"),
    "scaling of the search": ("test_scaling.py", "not correction"),
    "decoding in many channels": ("test_decode_channels.py", "not 20000"),
    "decoding in many channels, most classes": ("test_decode_channels.py", "20000"),
    "vocabulary": ("test_vocabulary.py", "not 65536"),
    "vocabulary, most classes": ("test_vocabulary.py", "65536"),
    "neural field": ("test_neural_field.py", "float32"),
    "neural field bf16": ("test_neural_field.py", "not float32"),
    "calls in alternation": ("test_alternation.py", ""),
    "training step and sampling": ("test_stack.py", ""),
}
PROGRESS = ROOT.parent / "build" / "bench"
#: Statuses of a part that passed; pytest exits with 5 if `-k` leaves no entry of it.
PASSED = ("exit 0", "exit 5")
#: Seconds below which no part is started.
SHORTEST = 20


def command(part, measured, only=""):
    file, chosen = PARTS[part]
    chosen = " and ".join(f"({text})" for text in (chosen, only) if text)
    pytest = [sys.executable, "-m", "pytest", f"bench/{file}", "-p", "no:cacheprovider", f"--benchmark-json={measured}"]
    return [*pytest, *(["-k", chosen] if chosen else [])]


def is_complete(path):
    """Whether a part was measured to its end at this commit."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return result.get("complete", False) and result["commit_info"]["id"] == commit().removesuffix("-dirty")


def measure(part, path, seconds, only=""):
    """Run a part. Returns its result or None, how it ended, and the `Interrupted` or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    ended, interrupted = run_to_end(command(part, path, only), seconds, {}, log)
    result = json.loads(path.read_text()) if path.exists() and path.stat().st_size else None
    if result:
        # Drop the single times: nothing reads them, and they are most of the file.
        for item in result["benchmarks"]:
            item["stats"].pop("data", None)
        result["complete"] = ended in PASSED
        path.write_text(json.dumps(result))
    return result, ended, interrupted


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m bench run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600, help="time for all parts (default 3600)")
    parser.add_argument("--limit", type=float, default=580, help="time for one part in seconds (default 580)")
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), default=list(PARTS), metavar="PART", help=f"of: {'; '.join(PARTS)}"
    )
    parser.add_argument(
        "-k", dest="only", default="", help="measure only these entries, as pytest's -k; they are not stored"
    )
    parser.add_argument("--again", action="store_true", help="also measure parts that are complete at this commit")
    parser.add_argument("--progress", type=pathlib.Path, default=PROGRESS, help="folder of the parts' files and logs")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder to store the results in")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT.parent / "README.md", help="file to render")
    return parser.parse_args(arguments)


def run_part(part, given, path, left):
    """Run one part unless it is complete, and store its results. Returns whether it passed, the folder stored or None, and the
    `Interrupted` or None."""
    if not given.again and is_complete(path):
        print(f"kept      {part}: measured at this commit", flush=True)
        return True, None, None
    if left < SHORTEST:
        print(f"left      {part}: start again to continue", flush=True)
        return False, None, None
    start = time.monotonic()
    result, ended, interrupted = measure(part, path, min(given.limit, left), given.only)
    count = len(result["benchmarks"]) if result else 0
    folder = store(result, given.results) if count and not given.only else None
    good = ended in PASSED
    seconds = time.monotonic() - start
    print(f"{'ok' if good else 'FAILED':9} {part}: {ended}, {count} entries, {seconds:.0f} s", flush=True)
    if not good:
        print("\n".join(path.with_suffix(".log").read_text().splitlines()[-30:]), flush=True)
    return good, folder, interrupted


def finish(given, files):
    """If all parts are complete, drop stored rows that none of them measured, and forget the progress."""
    done = {part: json.loads(path.read_text()) for part, path in files.items() if is_complete(path)}
    if len(done) < len(PARTS):
        return
    rows = [row for result in done.values() for row in rows_of(result)]
    machine = machine_name(next(iter(done.values()))["machine_info"])
    keep_only({(row["group"], row["entry"]) for row in rows}, given.results / machine)
    for path in files.values():
        path.unlink()
    print(f"complete: {len(rows)} entries", flush=True)


def main(arguments=None):
    given = parse(arguments)
    raise_on_signals()
    files = {part: given.progress / (part.replace(", ", "-").replace(" ", "-") + ".json") for part in PARTS}
    begin, passed, folder = time.monotonic(), True, None
    try:
        for part in given.parts:
            good, stored, interrupted = run_part(part, given, files[part], given.seconds - (time.monotonic() - begin))
            passed, folder = passed and good, stored or folder
            if interrupted:
                raise interrupted
        if not given.only:
            finish(given, files)
    except Interrupted as interrupted:
        print(f"interrupted by {interrupted}: the results are stored; start again to continue", flush=True)
        passed = False
    if folder and not given.only:
        report.write(given.readme, given.results)
    return 0 if passed else 1
