"""Fails when our kernels became slower than the stored results of this machine, and when there are none.

`python -m bench.compare FILE [--slower 1.3]`: FILE is what `pytest bench --benchmark-json=FILE` wrote. An entry of ours is too slow
when its median is more than `--slower` times the stored one and the gap exceeds both spreads.
"""

import argparse
import json
import pathlib
import sys

from .results import RESULTS, load, machine_name, rows_of


def compare(result, stored, slower):
    """Lines to print, and whether all is well."""
    known = {(row["group"], row["entry"]): row for row in stored["rows"]} if stored else {}
    lines, judged, well = [], 0, True
    for row in rows_of(result):
        if not row["entry"].startswith("ours"):
            continue
        old = known.get((row["group"], row["entry"]))
        if old is None:
            lines.append(f"new       {row['ms']:10.3f} ms  {row['group']}, {row['entry']}")
            continue
        judged += 1
        ratio = row["ms"] / old["ms"]
        bad = ratio > slower and row["ms"] - old["ms"] > row["iqr_ms"] + old["iqr_ms"]
        well &= not bad
        lines.append(f"{'SLOWER' if bad else 'ok':6} {ratio:5.2f}x {row['ms']:7.3f} ms  {row['group']}, {row['entry']}")
    if not judged:
        name = machine_name(result["machine_info"])
        lines.append(f"nothing stored for {name}: measure a trusted commit first, `python -m bench.results FILE`")
    return lines, well and judged > 0


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--slower", type=float, default=1.3, help="largest allowed ratio of medians (default 1.3)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args(arguments)
    result = json.loads(given.file.read_text())
    lines, well = compare(result, load(given.results / machine_name(result["machine_info"])), given.slower)
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
