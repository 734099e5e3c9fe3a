"""Results of `pytest bench/` as files: bench/results/MACHINE/OP.json, one row a measured entry.

`python -m bench.results FILE` stores what `pytest bench --benchmark-json=FILE` wrote. A row replaces the stored one of the same
group and entry; rows that were not measured again stay, each with the commit and date that it was measured at. Of an entry that one
commit measured in several passes the quicker pass stays, of every peer as of ours: other guests of a host slow it for minutes.
"""

import json
import pathlib
import re
import sys
from collections import defaultdict

ROOT = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "results"
_OURS = re.compile(r"ours( \((cuda|triton)\))?$")


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
        times = {"ms": stats["median"] * 1e3, "iqr_ms": stats["iqr"] * 1e3, "rounds": stats["rounds"]}
        rows.append({"group": item["group"], **info, **(times if "rate" not in info else {}), **mark})
    return rows


def is_ours(row):
    return bool(_OURS.match(row["entry"]))


def groups_of(rows):
    """{group: {entry: row}} of the measured groups, in a fixed order."""
    groups = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (row["op"], row["workload"], row.get("spread", 0), row["group"])):
        if row["op"] != "machine":
            groups[row["group"]][row["entry"]] = row
    return groups


def best_of_ours(members):
    return min((row for row in members.values() if is_ours(row)), key=lambda row: row["ms"], default=None)


def load(folder):
    """{"machine": ..., "rows": [...]} of a machine's folder, all ops together; None if nothing is stored there."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return None
    parts = [json.loads(path.read_text()) for path in files]
    return {"machine": parts[-1]["machine"], "rows": [row for part in parts for row in part["rows"]]}


def quicker(row, kept):
    """Of two passes of one entry at one commit the quicker one, with the shorter of their limits; else `row`."""
    if not kept or row["dirty"] or (kept["commit"], kept["dirty"]) != (row["commit"], False):
        return row
    first, other = (
        (row, kept) if row.get("rate", 0) > kept.get("rate", 0) or row.get("ms", 0) < kept.get("ms", 0) else (kept, row)
    )
    limit = {"limit_ms": min(first["limit_ms"], other["limit_ms"])} if "limit_ms" in first else {}
    return {**first, **limit, "passes": kept.get("passes", 1) + 1}


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
        kept = {(row["group"], row["entry"]): row for row in kept}
        fresh = {(row["group"], row["entry"]): row for row in rows}
        rows = [*(kept | {place: quicker(row, kept.get(place)) for place, row in fresh.items()}).values()]
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
