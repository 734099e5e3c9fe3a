"""Pictures of the stored results. matplotlib is imported only when a picture is drawn."""

from collections import defaultdict

from . import vocabulary
from .groups import PEERS, SCALING, has_peer, main_groups, table_groups
from .results import best_of_ours, is_ours, times_longer

#: name: caption of the picture.
PICTURES = {
    "speedup": "Time of each peer relative to ours",
    "roofline": "Our ops against the machine's limits",
    "scaling": "Time against classes, code channels and pixels",
    "memory": "Peak memory of a call in addition to its inputs",
    "vocabulary": "Time and peak memory of a training step of the last layer against the number of classes",
}
_OURS_COLOUR = "#1f5fa8"
_COLOURS = (
    "#9db4c0",
    "#b5651d",
    "#3a7d44",
    "#8a4f9e",
    "#c2a11c",
    "#4a4a4a",
    "#c0504d",
    "#5fa8a8",
    "#999999",
    "#7d5a3c",
    "#b48ead",
    "#d08770",
    "#5e81ac",
)
_COLOUR_OF = dict(zip(PEERS, _COLOURS, strict=True))


def _figure(columns, rows=1, size=(4.2, 3.4)):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def draw_speedup(rows):
    """Bars of each peer's time relative to ours, per main workload."""
    groups = {name: members for name, members in main_groups(rows).items() if has_peer(members)}
    if not groups:
        return None
    figure, ((axis,),) = _figure(1, size=(9, 0.55 * len(groups) + 1.2))
    labelled = set()
    for place, members in enumerate(groups.values()):
        ours = best_of_ours(members)
        shown = [peer for peer in PEERS if peer in members]
        for number, peer in enumerate(shown):
            height = 0.8 / len(shown)
            ratio = times_longer(members[peer], ours)
            at = place - 0.4 + (number + 0.5) * height
            label = None if peer in labelled else peer
            axis.barh(at, ratio - 1, height, left=1, color=_COLOUR_OF[peer], label=label)
            wrong = ", wrong pixels" if members[peer].get("wrong_pixels") else ""
            axis.text(max(ratio, 1) * 1.03, at, f"{ratio:.3g}{wrong}", va="center", fontsize=6)
            labelled.add(peer)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_xlabel("time relative to ours: right of the line, the peer is slower", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def draw_roofline(rows):
    """Left: compute-bound ops against arithmetic and memory limits. Right: memory-bound ops in percent of the copy rate."""
    rates = {row["entry"]: row["rate"] for row in rows if row["op"] == "machine"}
    copy = next((rate for name, rate in rates.items() if "copied" in name), None)
    peak = next((rate for name, rate in rates.items() if "multiply pipes" in name and "GFLOP" in name), None)
    bf16 = next((rate for name, rate in rates.items() if "bf16" in name), None)
    points = [row for row in rows if is_ours(row) and row.get("operations") and not SCALING.match(row["op"])]
    flat = [
        row
        for row in rows
        if is_ours(row) and row.get("moved") and not row.get("operations") and not SCALING.match(row["op"])
    ]
    if not (copy and peak and points):
        return None
    figure, ((left, right),) = _figure(2, size=(5.4, 4.2))
    for name, top, style in (("fp32", peak, "-"), ("bf16", bf16, "--")):
        if top:
            at = [0.1, top / copy, 5000]
            left.loglog(at, [min(top, copy * i) for i in at], style, color="black", linewidth=1, label=f"limit, {name}")
    ops = sorted({row["op"] for row in points})
    for row in points:
        seconds, half = row["ms"] * 1e-3, "bfloat16" in row["workload"]
        at, speed = row["operations"] / row["moved"], row["operations"] / seconds / 1e9
        label = f"{row['op']}{', bf16' if half else ''}"
        seen = label in left.get_legend_handles_labels()[1]
        colour, marker = _COLOURS[1 + ops.index(row["op"]) % (len(_COLOURS) - 1)], "s" if half else "o"
        left.plot(at, speed, marker, markersize=4, color=colour, label=None if seen else label)
    left.set_xlabel("operations of the multiply units per byte", fontsize=9)
    left.set_ylabel("GFLOP/s", fontsize=9)
    left.legend(fontsize=6, frameon=False)
    right.barh(range(len(flat)), [row["limit_ms"] / row["ms"] * 100 for row in flat], color=_OURS_COLOUR)
    right.set_yticks(range(len(flat)), [row["group"] for row in flat], fontsize=6)
    right.invert_yaxis()
    right.set_xlabel("% of copy bandwidth", fontsize=9)
    return figure


def draw_scaling(rows):
    """One plot per op and per axis of growth."""
    series = defaultdict(lambda: defaultdict(list))
    for row in rows:
        match = SCALING.match(row["op"])
        if match:
            series[match.groups()][row["entry"]].append((row["x"], row["ms"]))
    if not series:
        return None
    ops = sorted({op for op, _ in series})
    sizes = [size for size in ("classes", "channels", "pixels") if any(size == grown for _, grown in series)]
    figure, axes = _figure(len(sizes), len(ops))
    for line, op in zip(axes, ops):
        for axis, size in zip(line, sizes):
            for entry, points in series[op, size].items():
                colour = _COLOUR_OF.get(entry, _OURS_COLOUR)
                style = "-" if entry.startswith("ours") else "--"
                axis.plot(*zip(*sorted(points)), style, marker="o", markersize=3, color=colour, label=entry)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(size, fontsize=9)
            axis.set_title(op, fontsize=9)
            axis.legend(fontsize=6, frameon=False)
        line[0].set_ylabel("ms", fontsize=9)
    return figure


def draw_memory(rows):
    """Peak memory of the groups in which it was measured. Differences below 1 MiB are noise of the process."""
    groups = {
        name: members
        for name, members in table_groups(rows).items()
        if any(row.get("peak_mib") for row in members.values())
    }
    if not groups:
        return None
    shown = [
        (f"{name}, {entry}", row)
        for name, members in groups.items()
        for entry, row in members.items()
        if "peak_mib" in row and (is_ours(row) or entry in PEERS)
    ]
    figure, ((axis,),) = _figure(1, size=(8, 0.17 * len(shown) + 1))
    colours = [_OURS_COLOUR if is_ours(row) else _COLOURS[1] for _, row in shown]
    axis.barh(range(len(shown)), [max(row["peak_mib"], 0.1) for _, row in shown], color=colours)
    axis.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize=5)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("MiB in addition to the inputs, result included (blue: ours)", fontsize=9)
    return figure


def draw_vocabulary(rows):
    """Time and peak memory of a training step of the last layer over the classes. Hollow marks: memory that an entry would need."""
    series = vocabulary.series(rows, "training")
    if not series:
        return None
    figure, ((left, right),) = _figure(2, size=(4.6, 3.6))
    for entry, points in series.items():
        mine = entry.startswith("ours")
        colour = _OURS_COLOUR if mine else _COLOUR_OF[entry]
        style = {"color": colour, "linestyle": "-" if mine else "--", "marker": "s" if "8 channels" in entry else "o"}
        style |= {"markersize": 4, "label": vocabulary.LABELS.get(entry, entry)}
        for axis, values in ((left, [(k, row["ms"] / 1e3) for k, row in points]), (right, vocabulary.peaks(points))):
            axis.plot(*zip(*values), **style)
        missing = vocabulary.missing(entry, [k for k, _ in points], series)
        if missing:
            right.plot(*zip(*missing), linestyle=":", marker="o", markersize=5, fillstyle="none", color=colour)
    for axis, name in ((left, "seconds of a step"), (right, "peak memory, MB")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("classes", fontsize=9)
        axis.set_ylabel(name, fontsize=9)
    left.legend(fontsize=6, frameon=False)
    return figure


DRAW = {
    "speedup": draw_speedup,
    "roofline": draw_roofline,
    "scaling": draw_scaling,
    "memory": draw_memory,
    "vocabulary": draw_vocabulary,
}
