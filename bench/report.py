"""The README's benchmark section and its pictures, from the stored results alone.

`python -m bench.report` writes the section between the markers of README.md and docs/images/bench-MACHINE-*.png; no figure there is
typed by hand, and a test renders the text again and compares.
"""

import pathlib
import re
import sys
from collections import defaultdict

from . import targets
from .results import RESULTS, ROOT, best_of_ours, groups_of, is_ours, load

REPOSITORY = ROOT.parent
BEGIN, END = "<!-- bench table begin -->", "<!-- bench table end -->"
PEERS = (
    "reference",
    "eager",
    "torch.compile",
    "KeOps",
    "faiss IndexFlatL2",
    "faiss-gpu IndexFlatL2",
    "scipy cKDTree",
    "cdist+argmin",
    "cdist+argmin compiled",
    "Pillow quantize",
)
_SCALING = re.compile(r"(.*) by (classes|channels|pixels)$")


def table_groups(rows):
    """The groups of the main table: those with an entry of ours and a peer, without the scaling series."""
    chosen = {}
    for name, members in groups_of(rows).items():
        first = next(iter(members.values()))
        if not _SCALING.match(first["op"]) and best_of_ours(members) and any(peer in members for peer in PEERS):
            chosen[name] = members
    return chosen


def _cell(row, ours):
    wrong = f", {row['wrong_pixels']:,} wrong" if row.get("wrong_pixels") else ""
    return f"{row['ms'] / ours['ms']:.3g}x{wrong}"


def _rate(row):
    if "limit_ms" not in row:
        return "", ""
    seconds = row["ms"] * 1e-3
    speed = (
        f"{row['operations'] / seconds / 1e9:.0f} GFLOP/s"
        if row["operations"]
        else f"{row['moved'] / seconds / 1e9:.0f} GB/s"
    )
    return speed, f"{row['limit_ms'] / row['ms']:.0%}"


def markdown(stored, folder):
    """One machine's part: a line a workload, our time, and how many times longer each peer takes."""
    machine, rows = stored["machine"], stored["rows"]
    groups = table_groups(rows)
    peers = [peer for peer in PEERS if any(peer in members for members in groups.values())]
    where = (
        machine.get("gpu")
        or f"{machine['model']} with {machine['threads']} threads ({machine.get('instruction_set', '')})"
    )
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines = [
        f"**{where}**, torch {machine['torch']}, commit {commits}. Medians; every result was "
        "checked before it was timed. Ours in ms; for a peer, how many times longer it takes. Limit: share of the machine's limit "
        "that we reach: the longer of copying the bytes and of the arithmetic alone, at rates measured in the same run.",
        "",
        f"| op and workload | ours, ms | rate | limit | {' | '.join(peers)} |",
        f"|---|---|---|---|{'---|' * len(peers)}",
    ]
    for name, members in groups.items():
        ours = best_of_ours(members)
        rate, share = _rate(ours)
        cells = [_cell(members[peer], ours) if peer in members else "" for peer in peers]
        lines.append(f"| {name} | **{ours['ms']:.3g}** | {rate} | {share} | {' | '.join(cells)} |")
    lines += ["", *_sentences(rows), "", *_targets(stored)]
    for kind, text in PICTURES.items():
        if (REPOSITORY / "docs" / "images" / f"bench-{folder}-{kind}.png").exists():
            lines += ["", f"![{text}](docs/images/bench-{folder}-{kind}.png)"]
    return "\n".join(lines)


def _targets(stored):
    groups = groups_of(stored["rows"])
    missed = targets.missed(stored["machine"], groups)
    names = "; ".join(f"{t.what} {t.shown(t.judge(groups)[0])} (wanted {t.bound})" for t in missed)
    yield f"Targets that were missed: {names}." if missed else "No target that was measured was missed."
    yield from (
        "",
        "<details><summary>Every target</summary>",
        "",
        *targets.table(stored["machine"], groups),
        "",
        "</details>",
    )


def _sentences(rows):
    """What the table does not say: the limits, exactness, dtypes and threads."""
    rates = [f"{row['rate']:.3g} {row['entry']}" for row in rows if row["op"] == "machine"]
    if rates:
        yield f"Limits of this machine in the same run: {', '.join(rates)}."
    checked = [
        row["wrong_pixels"] for row in rows if row["entry"].startswith("ours") and row.get("wrong_pixels") is not None
    ]
    if checked:
        yield f"Pixels that our decoding gets wrong: {sum(checked)} in {len(checked)} entries."
    graphs = [f"{row['graph_ms']:.3g} ms ({row['group']}, {row['entry']})" for row in rows if "graph_ms" in row]
    if graphs:
        yield f"One call inside a CUDA graph: {', '.join(graphs)}."


#: kind: what the picture shows.
PICTURES = {
    "speedup": "How many times longer each peer takes",
    "roofline": "Our ops against the machine's limits",
    "scaling": "Time against classes, code channels and pixels",
    "memory": "Peak memory of a call beyond its inputs",
}
_COLOURS = (
    "#1f5fa8",
    "#b5651d",
    "#3a7d44",
    "#8a4f9e",
    "#c2a11c",
    "#4a4a4a",
    "#c0504d",
    "#5fa8a8",
    "#999999",
    "#7d5a3c",
)


def _figure(columns, rows=1, size=(4.2, 3.4)):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def draw_speedup(rows):
    groups = table_groups(rows)
    if not groups:
        return None
    figure, ((axis,),) = _figure(1, size=(9, 0.55 * len(groups) + 1.2))
    labelled = set()
    for place, members in enumerate(groups.values()):
        ours = best_of_ours(members)
        shown = [peer for peer in PEERS if peer in members]
        for number, peer in enumerate(shown):
            height = 0.8 / len(shown)
            ratio = members[peer]["ms"] / ours["ms"]
            at = place - 0.4 + (number + 0.5) * height
            label = None if peer in labelled else peer
            axis.barh(at, ratio, height, color=_COLOURS[PEERS.index(peer)], label=label)
            axis.text(ratio * 1.03, at, f"{ratio:.3g}", va="center", fontsize=6)
            labelled.add(peer)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("times our time (1 = ours)", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def draw_roofline(rows):
    rates = {row["entry"]: row["rate"] for row in rows if row["op"] == "machine"}
    copy = next((rate for name, rate in rates.items() if "copied" in name), None)
    peak = next((rate for name, rate in rates.items() if "multiply pipes" in name and "GFLOP" in name), None)
    points = [row for row in rows if is_ours(row) and row.get("operations") and not _SCALING.match(row["op"])]
    flat = [
        row
        for row in rows
        if is_ours(row) and row.get("moved") and not row.get("operations") and not _SCALING.match(row["op"])
    ]
    if not (copy and peak and points):
        return None
    figure, ((left, right),) = _figure(2, size=(5.2, 3.8))
    intensity = [0.1, peak / copy, 5000]
    left.loglog(intensity, [min(peak, copy * i) for i in intensity], color="black", linewidth=1)
    for number, row in enumerate(points):
        seconds = row["ms"] * 1e-3
        at, speed = row["operations"] / row["moved"], row["operations"] / seconds / 1e9
        left.plot(at, speed, "o", markersize=5, color=_COLOURS[number % len(_COLOURS)], label=row["group"])
    left.set_xlabel("operations of the multiply pipes a byte", fontsize=9)
    left.set_ylabel("GFLOP/s", fontsize=9)
    left.legend(fontsize=6, frameon=False)
    right.barh(range(len(flat)), [row["limit_ms"] / row["ms"] * 100 for row in flat], color=_COLOURS[0])
    right.set_yticks(range(len(flat)), [row["group"] for row in flat], fontsize=6)
    right.invert_yaxis()
    right.set_xlabel("% of copy bandwidth", fontsize=9)
    return figure


def draw_scaling(rows):
    series = defaultdict(lambda: defaultdict(list))
    for row in rows:
        match = _SCALING.match(row["op"])
        if match:
            series[match.groups()][row["entry"]].append((row["x"], row["ms"]))
    if not series:
        return None
    ops = sorted({op for op, _ in series})
    kinds = [kind for kind in ("classes", "channels", "pixels") if any(kind == k for _, k in series)]
    figure, axes = _figure(len(kinds), len(ops))
    for line, op in zip(axes, ops):
        for axis, kind in zip(line, kinds):
            for entry, points in series[op, kind].items():
                colour = (
                    _COLOURS[0] if entry.startswith("ours") else _COLOURS[1 + PEERS.index(entry) % (len(_COLOURS) - 1)]
                )
                style = "-" if entry.startswith("ours") else "--"
                axis.plot(*zip(*sorted(points)), style, marker="o", markersize=3, color=colour, label=entry)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(kind, fontsize=9)
            axis.set_title(op, fontsize=9)
            axis.legend(fontsize=6, frameon=False)
        line[0].set_ylabel("ms", fontsize=9)
    return figure


def draw_memory(rows):
    """Groups in which a peer's memory was measured too; differences under a MiB are the process's own noise."""
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
    colours = [_COLOURS[0] if is_ours(row) else _COLOURS[1] for _, row in shown]
    axis.barh(range(len(shown)), [max(row["peak_mib"], 0.1) for _, row in shown], color=colours)
    axis.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize=5)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("MiB beyond the inputs, result included (blue: ours)", fontsize=9)
    return figure


DRAW = {"speedup": draw_speedup, "roofline": draw_roofline, "scaling": draw_scaling, "memory": draw_memory}


def section(results=RESULTS):
    """The text between the markers: every machine with stored results, CPUs first."""
    parts = [(folder.name, load(folder)) for folder in sorted(results.iterdir()) if folder.is_dir()]
    parts = sorted((p for p in parts if p[1]), key=lambda part: ("gpu" in part[1]["machine"], part[0]))
    head = (
        "512 x 512 pixels, C = 3, fp32; ade512: K = 150, coco512: K = 171, many: K = 1000; spread: standard deviation of the "
        "points around their codes; training step and sampling: the nano network at 256 x 256. `make bench` measures, stores and "
        "renders this."
    )
    return "\n\n".join([head, *(markdown(stored, name) for name, stored in parts)])


def write(readme, results=RESULTS, images=REPOSITORY / "docs" / "images"):
    """Renders the section of `readme` and, unless `images` is None, the pictures."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()) if images else ():
        stored = load(folder)
        for kind, draw in DRAW.items():
            figure = draw(stored["rows"]) if stored else None
            if figure:
                figure.savefig(images / f"bench-{folder.name}-{kind}.png", dpi=130)
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{readme}: wanted the markers {BEGIN} and {END} around the section; add them")
    head, rest = text.split(BEGIN)
    readme.write_text(head + BEGIN + "\n" + section(results) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "README.md")
