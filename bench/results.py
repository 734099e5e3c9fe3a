"""Results of `pytest bench/` as files: bench/results/MACHINE/OP.json, one row per entry.

A new row replaces the stored row of the same group and entry. Rows that were not measured again stay; each row holds its commit and
date. If one commit measured a group in several passes, the faster pass stays whole, because other guests of a host slow it for
minutes.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
from collections import defaultdict

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
_OURS = re.compile(r"ours( \((cuda|triton)\))?$")


def commit():
    """The commit of this copy: FLOWSEG_BENCH_COMMIT, else HEAD of git, else ""."""
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
    """The folder name of a machine, from its GPU or from its CPU and threads."""
    return slug(machine.get("gpu") or f"{machine['model']}-{machine['threads']}-threads")


def rows_of(result):
    """One row per entry of a pytest-benchmark file, times in milliseconds. Interrupted entries are left out."""
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
        # pytest-benchmark's times do not count if the entry is a rate or a ratio, or was timed by CUDA events.
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
    """The groups of all ops, in a fixed order."""
    rows = sorted(rows, key=lambda row: (row["op"], row["workload"], row.get("spread", 0), row["group"]))
    return by_group(row for row in rows if row["op"] != "machine")


def best_of_ours(members):
    """The fastest of our entries at the commit measured last; None if there is none."""
    ours = [row for row in members.values() if is_ours(row)]
    last = max(ours, key=lambda row: row.get("date", ""), default={})
    return min(
        (row for row in ours if row.get("commit") == last.get("commit")), key=lambda row: row["ms"], default=None
    )


def times_longer(row, ours):
    """The time of a row relative to ours. If only one of both ran in a CUDA graph, compare the times without a graph."""
    key = "ms" if row.get("clock") == ours.get("clock") else "stream_ms"
    return row[key] / ours[key] if key in row and key in ours else row["ms"] / ours["ms"]


def load(folder):
    """{"machine": ..., "rows": [...]} of all ops in a machine's folder; None if nothing is stored there."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return None
    parts = [json.loads(path.read_text()) for path in files]
    return {"machine": parts[-1]["machine"], "rows": [row for part in parts for row in part["rows"]]}


def of_one_pass(kept, fresh):
    """Choose the rows to store for one group.

    If both passes are of the same clean commit, keep the faster pass whole, so its ratios come from one run, and add the entries
    that only the other pass has. Otherwise the fresh rows replace the kept ones. Ratios of calls timed alternately have no faster
    pass; the fresh one replaces the kept one.
    """
    both = [(kept[entry], row) for entry, row in fresh.items() if entry in kept]
    other = any(old["commit"] != new["commit"] or old["dirty"] or new["dirty"] for old, new in both)
    if (
        not both or other or all(old["date"] == new["date"] for old, new in both)
    ):  # the same date: one pass, imported twice
        return kept | fresh
    passes = 1 + max(old.get("passes", 1) for old, _ in both)
    slower = sum(new.get("ms", 0) - new.get("rate", 0) - old.get("ms", 0) + old.get("rate", 0) for old, new in both) > 0
    rows = fresh | kept if slower else kept | fresh
    return {entry: {**row, "passes": passes} for entry, row in rows.items()}


def store(result, root=RESULTS):
    """Write the rows of a pytest-benchmark result. Returns the folder."""
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
    """Drop the stored rows of a machine whose (group, entry) is not in `entries`."""
    for path in folder.glob("*.json"):
        stored = json.loads(path.read_text())
        rows = [row for row in stored["rows"] if (row["group"], row["entry"]) in entries]
        if rows:
            path.write_text(json.dumps({**stored, "rows": rows}, indent=1) + "\n")
        else:
            path.unlink()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench store", description="Store files of pytest-benchmark.")
    parser.add_argument(
        "files", type=pathlib.Path, nargs="+", help="files that `pytest bench --benchmark-json=FILE` wrote"
    )
    for path in parser.parse_args(arguments).files:
        print(store(json.loads(path.read_text())))
