"""Which GPU backend each op tries first: `python -m bench.preferences` writes flowseg_kernels/runtime/preferences.json.

An op that a GPU has measured on both backends (bench/results/GPU/, of `make gpu-report`) goes by those times. The others go by the
most instructions that the static tests allow each backend's inner loops, and the reason says that no GPU has measured them.
"""

import json
import pathlib
import statistics
import sys
from collections import defaultdict

from .results import RESULTS, ROOT, load

__all__ = ["measured", "preferences", "static"]

REPOSITORY = ROOT.parent
FILE = REPOSITORY / "flowseg_kernels" / "runtime" / "preferences.json"
BUDGETS = REPOSITORY / "tests" / "flowseg_kernels" / "static"
BACKENDS = {"cuda": "CUDA C++", "triton": "Triton"}
#: unit, loops in budget.json, kernel there, forms in triton_budget.json, and what the counts leave out.
_PAIR = ("pixel and class", ("rivals", "rivals and own class"))
_CANDIDATE = ("listed candidate", ("listed candidate",), "decode_by_grid", ("nearest_centroid C=3 grid bf16",))
COUNTS = {
    "distance_correction": (
        *_PAIR,
        "correct",
        ("distance_correction C=3 neg_log fp32", "distance_correction C=3 neg_log bf16"),
        "",
    ),
    "flow_loss": (*_PAIR, "loss", ("flow_loss C=3 velocity 0 bf16", "flow_loss C=3 endpoint 0 bf16"), ""),
    "nearest_centroid": (*_CANDIDATE, ""),
    "decode_confusion": (*_CANDIDATE, "; only CUDA C++ counts in shared memory"),
}
OPS = ("flow_interpolate", *COUNTS)


def _entry(order, because):
    return {"order": list(order), "because": because}


def static(op):
    """The entry of an op by what is known without a GPU."""
    if op not in COUNTS:
        because = (
            "bound by memory, and both read and write 16 bytes at a time; CUDA C++ compiles nothing at the first call"
        )
        return _entry(BACKENDS, f"no GPU has measured it: {because}")
    unit, loops, kernel, forms, besides = COUNTS[op]
    cuda = json.loads((BUDGETS / "budget.json").read_text())["instructions"][kernel]
    triton = json.loads((BUDGETS / "triton_budget.json").read_text())["instructions"]
    ways = ("most", "most_with_own_class")
    most = {
        "cuda": sorted({cuda[loop] for loop in loops}),
        "triton": sorted({max(triton[form][way] for form in forms) for way in ways}),
    }
    # A stable sort: as many instructions in both leave CUDA C++ first, which compiles nothing at the first call.
    order = sorted(BACKENDS, key=lambda name: statistics.mean(most[name]))
    counts = [f"{' to '.join(f'{n:g}' for n in most[name])} in {BACKENDS[name]}" for name in order]
    because = f"instructions a {unit} at most {', '.join(counts)}{besides}"
    return _entry(order, f"static count, no GPU has measured it: {because}")


def measured(op, folders):
    """The entry of an op by the stored results of every GPU, None where none has measured it on both backends."""
    ratios, gpus, commits = [], [], set()
    for folder in folders:
        result = load(folder)
        if not result or not result["machine"].get("gpu"):
            continue
        times = defaultdict(dict)
        for row in result["rows"]:
            if row["op"].split()[0] == op:
                times[row["group"]][row["entry"]] = row
        both = [
            (m["ours (cuda)"], m["ours (triton)"]) for m in times.values() if {"ours (cuda)", "ours (triton)"} <= set(m)
        ]
        for rows in both:
            # In a CUDA graph where both ran in one: what is left when launching costs nothing.
            clock = "graph_ms" if all("graph_ms" in row for row in rows) else "ms"
            ratios.append(rows[1][clock] / rows[0][clock])
            commits |= {row["commit"] for row in rows}
        gpus += [result["machine"]["gpu"]] if both else []
    if not ratios:
        return None
    ratio = statistics.geometric_mean(ratios)
    order = list(BACKENDS) if ratio >= 1 else list(BACKENDS)[::-1]
    faster, other = (BACKENDS[name] for name in order)
    because = f"{faster} takes {min(ratio, 1 / ratio):.2f} of the time of {other}, the geometric mean of {len(ratios)} workloads"
    return _entry(order, f"measured on {' and '.join(gpus)} at {', '.join(sorted(commits))}: {because}")


def preferences(results=RESULTS):
    """{op: {"order": backends, "because": why}} from what is stored."""
    folders = sorted(path for path in pathlib.Path(results).glob("*") if path.is_dir())
    return {op: measured(op, folders) or static(op) for op in OPS}


def main():
    FILE.write_text(json.dumps(preferences(), indent=1) + "\n")
    sys.stdout.write(FILE.read_text())


if __name__ == "__main__":
    main()
