"""Results of `pytest bench/` as files: bench/results/MACHINE/OP.json, one row a measured entry.

`python -m bench.results FILE` stores what `pytest bench --benchmark-json=FILE` wrote. A row replaces the stored one of the same
group and entry; rows that were not measured again stay, each with the commit and date that it was measured at. Of a group that
one commit measured in several passes the quicker pass stays, whole: other guests of a host slow it for minutes.
"""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections import defaultdict

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
_OURS = re.compile(r"ours( \((cuda|triton)\))?$")


def commit():
    """The commit of this copy: FLOWSEG_BENCH_COMMIT, else what git says, else ""."""
    given = os.environ.get("FLOWSEG_BENCH_COMMIT")
    if given:
        return given
    with contextlib.suppress(OSError):
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return asked.stdout.strip()
    return ""


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def machine_name(machine):
    """The folder of a machine: its GPU, or its CPU and threads."""
    return slug(machine.get("gpu") or f"{machine['model']}-{machine['threads']}-threads")


def rows_of(result):
    """One row a measured entry of a pytest-benchmark file, times in milliseconds. An entry that was cut short is none."""
    mark = {
        "commit": result["commit_info"]["id"][:9],
        "dirty": result["commit_info"]["dirty"],
        "date": result["datetime"],
    }
    rows = []
    for item in result["benchmarks"]:
        stats, info = item["stats"], dict(item["extra_info"])
        if stats["rounds"] < info.pop("asked", 1):
            continue
        # A figure of its own, no call that was timed; or a call that CUDA events timed.
        plain = "rate" in info or "ratio" in info or "ms" in info
        times = {"ms": stats["median"] * 1e3, "iqr_ms": stats["iqr"] * 1e3, "rounds": stats["rounds"]}
        rows.append({"group": item["group"], **info, **({} if plain else times), **mark})
    return rows


def is_ours(row):
    return bool(_OURS.match(row["entry"]))


def by_group(rows):
    """{group: {entry: row}}."""
    groups = defaultdict(dict)
    for row in rows:
        groups[row["group"]][row["entry"]] = row
    return groups


def groups_of(rows):
    """The measured groups, in a fixed order."""
    rows = sorted(rows, key=lambda row: (row["op"], row["workload"], row.get("spread", 0), row["group"]))
    return by_group(row for row in rows if row["op"] != "machine")


def best_of_ours(members):
    """The quickest of our entries at the commit that was measured last; None if there is none."""
    ours = [row for row in members.values() if is_ours(row)]
    last = max(ours, key=lambda row: row.get("date", ""), default={})
    return min(
        (row for row in ours if row.get("commit") == last.get("commit")), key=lambda row: row["ms"], default=None
    )


def times_longer(row, ours):
    """How many times as long as ours a row took. Where one of them could not run in a CUDA graph, both call after call."""
    key = "ms" if row.get("clock") == ours.get("clock") else "stream_ms"
    return row[key] / ours[key] if key in row and key in ours else row["ms"] / ours["ms"]


def load(folder):
    """{"machine": ..., "rows": [...]} of a machine's folder, all ops together; None if nothing is stored there."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return None
    parts = [json.loads(path.read_text()) for path in files]
    return {"machine": parts[-1]["machine"], "rows": [row for part in parts for row in part["rows"]]}


def of_one_pass(kept, fresh):
    """Rows of one group to store: of two passes of one commit the quicker one's, with what the other alone has; else `fresh` over
    `kept`. A pass stays whole, so that its ratios are of one run. No pass of calls in alternation is the quicker one: the
    newer stays."""
    both = [(kept[entry], row) for entry, row in fresh.items() if entry in kept]
    other = any(old["commit"] != new["commit"] or old["dirty"] or new["dirty"] for old, new in both)
    if not both or other or all(old["date"] == new["date"] for old, new in both):  # the same date: imported twice
        return kept | fresh
    passes = 1 + max(old.get("passes", 1) for old, _ in both)
    slower = sum(new.get("ms", 0) - new.get("rate", 0) - old.get("ms", 0) + old.get("rate", 0) for old, new in both) > 0
    rows = fresh | kept if slower else kept | fresh
    return {entry: {**row, "passes": passes} for entry, row in rows.items()}


def store(result, root=RESULTS):
    """Write the rows of a pytest-benchmark result; returns the folder."""
    folder = root / machine_name(result["machine_info"])
    folder.mkdir(parents=True, exist_ok=True)
    by_op = defaultdict(list)
    for row in rows_of(result):
        by_op[row["op"]].append(row)
    for op, rows in by_op.items():
        path = folder / f"{slug(op)}.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        old, new = by_group(kept), by_group(rows)
        rows = [row for group in old | new for row in of_one_pass(old.get(group, {}), new.get(group, {})).values()]
        rows.sort(key=lambda row: (row["group"], row.get("x", 0)))
        text = json.dumps({"machine": result["machine_info"], "rows": rows}, indent=1)
        path.write_text(text + "\n")
    return folder


def keep_only(entries, folder):
    """Drop the stored rows of a machine that are not among (group, entry)."""
    for path in folder.glob("*.json"):
        stored = json.loads(path.read_text())
        rows = [row for row in stored["rows"] if (row["group"], row["entry"]) in entries]
        if rows:
            path.write_text(json.dumps({**stored, "rows": rows}, indent=1) + "\n")
        else:
            path.unlink()


def main(path):
    print(store(json.loads(pathlib.Path(path).read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
