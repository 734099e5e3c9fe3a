"""The GPU backend that each op tries first: written to flowseg_kernels/runtime/preferences.json.

If a GPU has timed both backends of an op (bench/results/GPU/, from `make gpu-report`), these times decide. Otherwise the counted
instructions of each backend's inner loops decide, and the reason says that no GPU has measured the op. No GPU has run the neural
field's kernels in CUDA C++ at all: until one has timed them, Triton's go first, which have run on one.

CUDA C++ goes first if both are close: it compiles nothing at the first call and takes half the host time. "Close" is 10 % of a
measured time and 2 % of an instruction count.
"""

import argparse
import json
import pathlib
import statistics
from collections import defaultdict

from .results import RESULTS, ROOT, load

__all__ = ["measured", "preferences", "static"]

REPOSITORY = ROOT.parent
FILE = REPOSITORY / "flowseg_kernels" / "runtime" / "preferences.json"
BUDGETS = REPOSITORY / "tests" / "flowseg_kernels" / "static"
BACKENDS = {"cuda": "CUDA C++", "triton": "Triton"}
#: Relative differences below which instruction counts, and measured times, are a tie.
TIE, MEASURED_TIE = 0.02, 0.1
_PAIR = ("pixel and class", ("rivals", "rivals and own class"))
_CANDIDATE = ("listed candidate", ("listed candidate",), "decode_by_grid", ("nearest_centroid C=3 grid bf16",))
#: op: (unit, loops of the kernel in budget.json, that kernel, forms in triton_budget.json)
COUNTS = {
    "distance_correction": (
        *_PAIR,
        "correct",
        ("distance_correction C=3 neg_log fp32", "distance_correction C=3 neg_log bf16"),
    ),
    "flow_loss": (*_PAIR, "loss", ("flow_loss C=3 velocity 0 bf16", "flow_loss C=3 endpoint 0 bf16")),
    "nearest_centroid": _CANDIDATE,
    "decode_confusion": _CANDIDATE,
}
OPS = ("flow_interpolate", *COUNTS, "class_probabilities", "top_classes", "neural_field")


def _entry(order, because):
    return {"order": list(order), "because": because}


def static(op):
    """The entry of an op by instruction counts, without a GPU."""
    ahead = "CUDA C++ compiles nothing at the first call"
    if op == "neural_field":
        because = "no GPU has measured it: its kernels in CUDA C++ have not run on a GPU yet, those in Triton have"
        return _entry(("triton", "cuda"), because)
    if op == "top_classes":
        because = f"no GPU has measured it: a warp skips classes that none of its pixels keeps; Triton skips eight at once; {ahead}"
        return _entry(BACKENDS, because)
    if op == "class_probabilities":
        because = f"no GPU has measured it: both are bound by writing K numbers per pixel; {ahead}"
        return _entry(BACKENDS, because)
    if op not in COUNTS:
        return _entry(BACKENDS, f"no GPU has measured it: both read and write 16 bytes at a time; {ahead}")
    unit, loops, kernel, forms = COUNTS[op]
    cuda = json.loads((BUDGETS / "budget.json").read_text())["instructions"][kernel]
    triton = json.loads((BUDGETS / "triton_budget.json").read_text())["counted"]
    ways = zip(*(triton[form]["instructions"].values() for form in forms))
    counts = {"cuda": [cuda[loop] for loop in loops], "triton": [max(way) for way in ways]}
    mean = {name: statistics.mean(found) for name, found in counts.items()}
    tie = max(mean.values()) <= (1 + TIE) * min(mean.values())
    order = list(BACKENDS) if tie else sorted(BACKENDS, key=mean.get)
    shown = [f"{' to '.join(f'{round(n, 2):g}' for n in counts[name])} in {BACKENDS[name]}" for name in order]
    because = f"instructions per {unit}: {', '.join(shown)}" + (f"; a tie, and {ahead}" if tie else "")
    return _entry(order, f"static count, no GPU has measured it: {because}")


def measured(op, folders):
    """The entry of an op by the stored results of all GPUs; None if no GPU has timed both backends."""
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
            ratios.append(rows[1]["ms"] / rows[0]["ms"])
            commits |= {row["commit"] for row in rows}
        gpus += [result["machine"]["gpu"]] if both else []
    if not ratios:
        return None
    ratio = statistics.geometric_mean(ratios)
    tie = 1 - MEASURED_TIE < ratio < 1
    order = list(BACKENDS) if ratio >= 1 or tie else list(BACKENDS)[::-1]
    faster, other = (BACKENDS[name] for name in (("cuda", "triton") if ratio >= 1 else ("triton", "cuda")))
    because = f"{faster} takes {min(ratio, 1 / ratio):.2f} of the time of {other}, the geometric mean of {len(ratios)} workloads"
    because += ", from several runs" if len(commits) > 1 else ""
    because += "; a tie, and CUDA C++ compiles nothing at the first call" if tie else ""
    return _entry(order, f"measured on {' and '.join(gpus)} at {', '.join(sorted(commits))}: {because}")


def preferences(results=RESULTS):
    """{op: {"order": backends, "because": why}} from the stored results."""
    folders = sorted(path for path in pathlib.Path(results).glob("*") if path.is_dir())
    return {op: measured(op, folders) or static(op) for op in OPS}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench preferences", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="print the preferences without writing them")
    text = json.dumps(preferences(), indent=1)
    if not parser.parse_args(arguments).show:
        FILE.write_text(text + "\n")
    print(text)
    return 0
