"""Turn a result of `pytest bench/ --benchmark-json=FILE` into the table of README.md, and store it with its machine.

`python -m bench.table FILE` writes bench/results/MACHINE.json (medians only) and the table between the markers of README.md.
"""

import json
import pathlib
import re
import sys
from collections import defaultdict

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench table begin -->", "<!-- bench table end -->"


def rows_of(result):
    """One row a measured entry, medians in milliseconds."""
    rows = []
    for item in result["benchmarks"]:
        stats, info = item["stats"], item["extra_info"]
        rows.append(
            {
                "group": item["group"],
                "entry": info["entry"],
                "ms": stats["median"] * 1e3,
                "iqr_ms": stats["iqr"] * 1e3,
                "rounds": stats["rounds"],
                "wrong_pixels": info.get("wrong_pixels"),
                "pixels": info["pixels"],
            }
        )
    return rows


def markdown(rows, machine, commit):
    """A table a group: median, ratio to ours, and wrong pixels for decoding."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    lines = [
        f"Measured on {machine['model']}, {machine['threads']} threads, torch {machine['torch']}, commit {commit}: medians in "
        "one run, every result checked first (`make bench`).",
        "",
        "| op and workload | " + "entry | ms | ours is faster by | wrong pixels |",
        "|---|---|---|---|---|",
    ]
    for name, members in groups.items():
        ours = next((r["ms"] for r in members if r["entry"] == "ours"), None)
        for row in members:
            ratio = f"{row['ms'] / ours:.1f}x" if ours and row["entry"] != "ours" else ""
            wrong = "" if row["wrong_pixels"] is None else str(row["wrong_pixels"])
            entry = f"**{row['entry']}**" if row["entry"] == "ours" else row["entry"]
            lines.append(f"| {name} | {entry} | {row['ms']:.2f} | {ratio} | {wrong} |")
    return "\n".join(lines)


def main(path):
    result = json.loads(pathlib.Path(path).read_text())
    machine = result["machine_info"]
    commit = result["commit_info"]["id"][:9]
    rows = rows_of(result)
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine['model']}-{machine['threads']}-threads".lower()).strip("-")
    stored = {"machine": machine, "commit": commit, "datetime": result["datetime"], "rows": rows}
    (ROOT / "bench" / "results" / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"README.md: wanted the markers {BEGIN} and {END} around the table; add them")
    head, rest = text.split(BEGIN)
    readme.write_text(head + BEGIN + "\n" + markdown(rows, machine, commit) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main(sys.argv[1])
