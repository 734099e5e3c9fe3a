"""Fail if our kernels became slower than the stored results of this machine.

Reads files that `pytest bench --benchmark-json=FILE` wrote. An entry of ours is too slow if its median exceeds the stored median
times `--slower` and the difference exceeds both interquartile ranges together. Also fails if nothing is stored for this machine,
and, without `--part`, if a stored entry was not measured.
"""

import argparse
import json
import pathlib

from .results import RESULTS, load, machine_name, rows_of


def compare(machine, rows, stored, slower, part=False):
    """Lines to print, and whether the comparison passed."""
    known = (
        {(row["group"], row["entry"]): row for row in stored["rows"] if row["entry"].startswith("ours")}
        if stored
        else {}
    )
    lines, judged, passed = [], 0, True
    for row in rows:
        if not row["entry"].startswith("ours"):
            continue
        old = known.pop((row["group"], row["entry"]), None)
        if old is None:
            lines.append(f"new       {row['ms']:10.3f} ms  {row['group']}, {row['entry']}")
            continue
        judged += 1
        ratio = row["ms"] / old["ms"]
        bad = ratio > slower and row["ms"] - old["ms"] > row["iqr_ms"] + old["iqr_ms"]
        passed &= not bad
        lines.append(f"{'SLOWER' if bad else 'ok':6} {ratio:5.2f}x {row['ms']:7.3f} ms  {row['group']}, {row['entry']}")
    if not judged:
        lines.append(f"nothing stored for {machine}: measure a trusted commit first, `make bench`")
    if part:
        known.clear()
    lines += [f"GONE                       {group}, {entry}: stored, not measured now" for group, entry in known]
    return lines, passed and judged > 0 and not known


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=pathlib.Path, nargs="+")
    parser.add_argument("--slower", type=float, default=1.3, help="largest allowed ratio of medians (default 1.3)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the stored results")
    parser.add_argument("--part", action="store_true", help="the files hold only some of the entries")
    given = parser.parse_args(arguments)
    fresh = [json.loads(path.read_text()) for path in given.files]
    machine = machine_name(fresh[0]["machine_info"])
    rows = [row for result in fresh for row in rows_of(result)]
    lines, passed = compare(machine, rows, load(given.results / machine), given.slower, given.part)
    print("\n".join(lines))
    return 0 if passed else 1
