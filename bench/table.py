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


PEERS = ("eager", "torch.compile", "KeOps", "faiss IndexFlatL2", "scipy cKDTree", "cdist+argmin", "Pillow quantize")


def markdown(rows, machine, commit):
    """One line a workload: our time, and how many times longer each peer takes, with the pixels it gets wrong."""
    groups = defaultdict(dict)
    for row in rows:
        groups[row["group"]][row["entry"]] = row
    lines = [
        f"Measured on {machine['model']}, {machine['threads']} threads, torch {machine['torch']}, commit {commit}: medians of one "
        "run, every result checked before it was timed (`make bench`; 512 x 512 pixels, C = 3, fp32; ade512 K = 150, coco512 "
        "K = 171, many K = 1000; spread: standard deviation of the points around their codes). Times are ours; for a peer, how "
        "many times longer it takes.",
        "",
        f"| op and workload | ours, ms | {' | '.join(PEERS)} |",
        f"|---|---|{'---|' * len(PEERS)}",
    ]
    for name, members in groups.items():
        ours = members["ours"]["ms"]
        cells = [_cell(members[peer], ours) if peer in members else "" for peer in PEERS]
        lines.append(f"| {name} | **{ours:.2f}** | {' | '.join(cells)} |")
    wrong = [row["wrong_pixels"] for row in rows if row["entry"].startswith("ours") and row["wrong_pixels"] is not None]
    lines += ["", f"Pixels that our decoding gets wrong: {sum(wrong)} in {len(wrong)} workloads."]
    return "\n".join(lines)


def _cell(row, ours):
    wrong = f", {row['wrong_pixels']:,} wrong" if row["wrong_pixels"] else ""
    return f"{row['ms'] / ours:.1f}x{wrong}"


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
