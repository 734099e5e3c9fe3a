"""`python -m bench.run`: the whole of `pytest bench/` in parts, the results of each stored and rendered as soon as it ends.

A part is one pytest process. A run that was cut, or stopped by `--seconds`, goes on where it ended when it is started again at the
same commit; after the last part the stored rows that nothing measures any more are dropped, and the next run measures anew.
"""

import argparse
import json
import pathlib
import sys
import time

from . import report
from .child import Cut, carry_out, cut_on_signals
from .results import RESULTS, ROOT, commit, keep_only, machine_name, rows_of, store

#: name: files and pytest's -k. Short enough each to fit a slice of ten minutes; a test holds that every entry is in one of them.
PARTS = {
    "limits": ("test_limits.py", ""),
    "correction": ("test_correction.py", "test_distance_correction"),
    "loss": ("test_correction.py", "not test_distance_correction"),
    "decoding": ("test_decode.py", "not many"),
    "decoding, many classes": ("test_decode.py", "many"),
    "scaling of the correction": ("test_scaling.py", "correction"),
    "scaling of the search": ("test_scaling.py", "not correction"),
    "neural field": ("test_neural_field.py", "float32"),
    "neural field bf16": ("test_neural_field.py", "not float32"),
    "calls in alternation": ("test_alternation.py", ""),
    "training step and sampling": ("test_stack.py", ""),
}
PROGRESS = ROOT.parent / "build" / "bench"


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
    """Runs a part; returns its result, or None where nothing was measured, how it ended and the Cut if there was one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    ended, cut = carry_out(command(part, path, only), seconds, {}, log)
    result = json.loads(path.read_text()) if path.exists() and path.stat().st_size else None
    if result:
        # Without the single times, which nothing reads and which are most of the file.
        for item in result["benchmarks"]:
            item["stats"].pop("data", None)
        # pytest says 5 where a selection leaves nothing of a part.
        result["complete"] = ended in ("exit 0", "exit 5")
        path.write_text(json.dumps(result))
    return result, ended, cut


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600, help="start no part that would begin later than this")
    parser.add_argument("--limit", type=float, default=580, help="seconds for a part (default 580)")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument(
        "-k", dest="only", default="", help="of every part only these entries, as pytest's -k; not stored"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what this commit has measured already")
    parser.add_argument("--progress", type=pathlib.Path, default=PROGRESS, help="folder of what the parts wrote")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT.parent / "README.md")
    given = parser.parse_args(arguments)
    cut_on_signals()
    begin, well, done, folder = time.monotonic(), True, {}, None
    files = {part: given.progress / (part.replace(", ", "-").replace(" ", "-") + ".json") for part in PARTS}
    try:
        for part in given.parts:
            left = given.seconds - (time.monotonic() - begin)
            if not given.again and is_complete(files[part]):
                print(f"kept      {part}: measured at this commit", flush=True)
                continue
            if left < 20:
                print(f"left      {part}: start again to go on", flush=True)
                well = False
                continue
            start = time.monotonic()
            result, ended, cut = measure(part, files[part], min(given.limit, left), given.only)
            count = len(result["benchmarks"]) if result else 0
            if count and not given.only:
                folder = store(result, given.results)
            good = ended in ("exit 0", "exit 5")
            well &= good
            print(
                f"{'ok' if good else 'FAILED':9} {part}: {ended}, {count} entries, {time.monotonic() - start:.0f} s",
                flush=True,
            )
            if not good:
                print("\n".join(files[part].with_suffix(".log").read_text().splitlines()[-30:]), flush=True)
            if cut:
                raise cut
        done = {part: json.loads(path.read_text()) for part, path in files.items() if is_complete(path)}
        if len(done) == len(PARTS) and not given.only:
            rows = [row for result in done.values() for row in rows_of(result)]
            machine = machine_name(next(iter(done.values()))["machine_info"])
            keep_only({(row["group"], row["entry"]) for row in rows}, given.results / machine)
            for path in files.values():
                path.unlink()
            print(f"complete: {len(rows)} entries", flush=True)
    except Cut as cut:
        print(f"cut by {cut}: what was measured is stored; start again to go on", flush=True)
        well = False
    if folder and not given.only:
        report.write(given.readme, given.results)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
