"""What was measured as pages and pictures, from the stored results alone.

`python -m bench.report` writes the main workloads between the markers of README.md, everything to docs/results/bench.md, and
docs/images/bench-MACHINE-*.png; no figure there is typed by hand, and a test renders both texts again and compares.
"""

import pathlib
import re
import sys
from collections import defaultdict

from . import targets
from .results import RESULTS, ROOT, best_of_ours, groups_of, is_ours, load, times_longer

REPOSITORY = ROOT.parent
BEGIN, END = "<!-- bench table begin -->", "<!-- bench table end -->"
PEERS = (
    "reference",
    "eager",
    "torch.compile",
    "KeOps",
    "faiss IndexFlatL2",
    "faiss-gpu IndexFlatL2",
    "flash-kmeans",
    "scipy cKDTree",
    "cdist+argmin",
    "cdist+argmin compiled",
    "Pillow quantize",
)
_SCALING = re.compile(r"(.*) by (classes|channels|pixels)$")


def table_groups(rows):
    """The groups of the main table, without the scaling series: those with an entry of ours and, on a CPU, a peer.

    A GPU is at hand for minutes, so ours stand in the table before a peer was measured."""
    chosen = {}
    for name, members in groups_of(rows).items():
        ours = best_of_ours(members)
        if ours and not _SCALING.match(ours["op"]) and ("clock" in ours or _has_peer(members)):
            chosen[name] = members
    return chosen


def _has_peer(members):
    return any(peer in members for peer in PEERS)


def _milliseconds(ours):
    """Our time; on a GPU with the backend that takes it."""
    backend = ours["entry"].partition("(")[2].partition(")")[0]
    return f"**{ours['ms']:.3g}**" + (f" {backend}" if backend else "")


#: What the README shows: the ops as the paper trains and samples with them. The page has all.
_MAIN = re.compile(
    r"(distance_correction|flow_loss forward\+backward|flow_interpolate) ade512$|decode_confusion ade512 spread"
    r"|nearest_centroid ade512 spread [\d.]+$|neural_field .* XL (256 patches|4096 patches bfloat16)|training step|sampling"
)


def main_groups(rows):
    return {name: members for name, members in table_groups(rows).items() if _MAIN.match(name)}


def _times(row, ours):
    wrong = f", {row['wrong_pixels']:,} wrong" if row.get("wrong_pixels") else ""
    return f"{times_longer(row, ours):.3g}x{wrong}"


def _share(row):
    return f"{row['limit_ms'] / row['ms']:.0%}" if "limit_ms" in row else ""


def _rate(row):
    if "limit_ms" not in row:
        return ""
    seconds = row["ms"] * 1e-3
    if row["operations"]:
        return f"{row['operations'] / seconds / 1e9:.0f} GFLOP/s"
    return f"{row['moved'] / seconds / 1e9:.1f} GB/s"


def _table(head, lines):
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in lines)]


def where(stored):
    """The machine, its torch and the commits that its rows were measured at."""
    machine, rows = stored["machine"], stored["rows"]
    name = machine.get("gpu") or (
        f"{machine['model']} with {machine['threads']} threads ({machine.get('instruction_set', '')})"
    )
    marks = {f"{row['commit']}{' with uncommitted changes' if row.get('dirty') else ''}" for row in rows}
    passes = {row.get("passes", 1) for row in rows}
    times = f", of each row the quickest of {' or '.join(map(str, sorted(passes)))} passes" if max(passes) > 1 else ""
    return f"**{name}**, torch {machine['torch']}, commit {', '.join(sorted(marks))}{times}."


def headline(stored):
    """One machine's part of the README: the main workloads, the two plain forms and the fastest special one."""
    lines = []
    for name, members in main_groups(stored["rows"]).items():
        ours = best_of_ours(members)
        # For the search, plain PyTorch has a name of its own.
        plain = "cdist+argmin" if "cdist+argmin" in members else "eager"
        special = [members[peer] for peer in PEERS[3:] if peer in members and not members[peer].get("wrong_pixels")]
        best = min(special, key=lambda row: row["ms"], default=None)
        lines.append(
            [
                name,
                _milliseconds(ours),
                *(_times(members[peer], ours) if peer in members else "" for peer in (plain, "torch.compile")),
                f"{best['entry']} {_times(best, ours)}" if best else "",
                _share(ours),
            ]
        )
    head = ("op and workload", "ours, ms", "eager", "torch.compile", "fastest exact other", "of the limit")
    missed = targets.missed(stored["machine"], groups_of(stored["rows"]))
    count = sum(
        target.judge(groups_of(stored["rows"]))[1] is not None for target in targets.targets_of(stored["machine"])
    )
    every = len(targets.targets_of(stored["machine"]))
    judged = f"Of {every} targets that we set ourselves"
    if count < every:
        judged += f" {count} were measured and"
    verdict = f"{judged} {count - len(missed)} are met ([all](docs/results/bench.md))"
    names = f"; missed: {'; '.join(_missed(stored))}" if 0 < len(missed) <= 4 else ""
    return [where(stored), "", *_table(head, lines), "", f"{verdict}{names}."]


def _missed(stored):
    groups = groups_of(stored["rows"])
    for target in targets.missed(stored["machine"], groups):
        yield f"{target.what} {target.shown(target.judge(groups)[0])} ({target.bound})"


def details(stored, folder):
    """One machine's part of the page: every workload and peer, limits, targets and pictures."""
    groups = table_groups(stored["rows"])
    peers = [peer for peer in PEERS if any(peer in members for members in groups.values())]
    lines = []
    for name, members in groups.items():
        ours = best_of_ours(members)
        cells = [_times(members[peer], ours) if peer in members else "" for peer in peers]
        lines.append([name, _milliseconds(ours), _spread(ours), _rate(ours), _share(ours), *cells])
    head = ("op and workload", "ours, ms", "spread", "rate", "of the limit", *peers)
    text = [where(stored), "", *_table(head, lines), "", *_sentences(stored["rows"])]
    text += ["", *targets.table(stored["machine"], groups_of(stored["rows"]))]
    for kind, caption in PICTURES.items():
        if (REPOSITORY / "docs" / "images" / f"bench-{folder}-{kind}.png").exists():
            text += ["", f"![{caption}](../images/bench-{folder}-{kind}.png)"]
    return text


def _spread(row):
    """Half the distance between the quartiles, in percent of the median."""
    return f"±{row['iqr_ms'] / row['ms'] / 2:.0%}" if "iqr_ms" in row else ""


def _sentences(rows):
    """What the table does not say: the limits, exactness, calls in alternation."""
    rates = [f"{row['rate']:.3g} {row['entry']}" for row in rows if row["op"] == "machine"]
    if rates:
        yield (
            f"Limits of this machine: {', '.join(rates)}. So the first part of the run measured them; every part measures them "
            "again, and its rows are held against its own."
        )
    checked = [
        row["wrong_pixels"] for row in rows if row["entry"].startswith("ours") and row.get("wrong_pixels") is not None
    ]
    if checked:
        yield f"Pixels that our decoding gets wrong: {sum(checked)} in {len(checked)} entries."
    pairs = [f"{row['entry']} {row['ratio']:.3g}x" for row in rows if row["op"] == "alternation"]
    if pairs:
        yield f"Calls in alternation, medians of their pairs' ratios: {'; '.join(pairs)}."
    launched = [
        row for row in rows if is_ours(row) and "host_ms" in row and row["op"] not in ("training step", "sampling")
    ]
    if launched:
        hosts = sorted(row["host_ms"] for row in launched)
        yield (
            "Times are of one call in a CUDA graph of up to 50 calls. Called from Python, our ops keep the host busy for "
            f"{hosts[0]:.2g} to {hosts[-1]:.2g} ms per call."
        )


#: kind: what the picture shows.
PICTURES = {
    "speedup": "How many times longer each peer takes",
    "roofline": "Our ops against the machine's limits",
    "scaling": "Time against classes, code channels and pixels",
    "memory": "Peak memory of a call beyond its inputs",
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
    groups = {name: members for name, members in main_groups(rows).items() if _has_peer(members)}
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
    axis.set_xlabel("times our time: right of the line, a peer takes longer than ours", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def draw_roofline(rows):
    rates = {row["entry"]: row["rate"] for row in rows if row["op"] == "machine"}
    copy = next((rate for name, rate in rates.items() if "copied" in name), None)
    peak = next((rate for name, rate in rates.items() if "multiply pipes" in name and "GFLOP" in name), None)
    bf16 = next((rate for name, rate in rates.items() if "bf16" in name), None)
    points = [row for row in rows if is_ours(row) and row.get("operations") and not _SCALING.match(row["op"])]
    flat = [
        row
        for row in rows
        if is_ours(row) and row.get("moved") and not row.get("operations") and not _SCALING.match(row["op"])
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
    left.set_xlabel("operations of the multiply pipes a byte", fontsize=9)
    left.set_ylabel("GFLOP/s", fontsize=9)
    left.legend(fontsize=6, frameon=False)
    right.barh(range(len(flat)), [row["limit_ms"] / row["ms"] * 100 for row in flat], color=_OURS_COLOUR)
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
                colour = _COLOUR_OF.get(entry, _OURS_COLOUR)
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
    colours = [_OURS_COLOUR if is_ours(row) else _COLOURS[1] for _, row in shown]
    axis.barh(range(len(shown)), [max(row["peak_mib"], 0.1) for _, row in shown], color=colours)
    axis.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize=5)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("MiB beyond the inputs, result included (blue: ours)", fontsize=9)
    return figure


DRAW = {"speedup": draw_speedup, "roofline": draw_roofline, "scaling": draw_scaling, "memory": draw_memory}


_WORKLOADS = (
    "512 x 512 pixels, C = 3, fp32; ade512: K = 150, coco512: K = 171, many: K = 1000; spread: standard deviation of the points "
    "around their codes; neural field: PixNerd's decoder, Hx = 64, p = 16, L of 2 and XL of 4 blocks; training step and sampling: "
    "the nano network at 256 x 256, or the one that is named. "
    "A CPU takes one image with a random class per pixel. A GPU takes 16 images with squares of 32 "
    "pixels of one class each or, where the workload says so, a random class per pixel; it runs up to 50 calls in one CUDA graph."
)
_COLUMNS = (
    "Medians; every result was checked before it was timed, gradients included. For a peer: how many times longer it takes. Of "
    "the limit: the time that moving the op's bytes or its arithmetic alone would take here, whichever is longer, as a share of "
    "ours. On a GPU ours is the quicker of the two backends at the commit that was measured last; CUDA C++ runs by default where "
    "they are within 10 %."
)


def _machines(results):
    """(folder, stored) of every machine, CPUs first."""
    parts = [(folder.name, load(folder)) for folder in sorted(results.iterdir()) if folder.is_dir()]
    return sorted((p for p in parts if p[1]), key=lambda part: ("gpu" in part[1]["machine"], part[0]))


def section(results=RESULTS):
    """The text between the README's markers: the main workloads of every machine."""
    text = [_WORKLOADS, _COLUMNS + " `make bench` measures, stores and renders this; [all workloads, peers, limits, targets and "
            "pictures](docs/results/bench.md)."]  # fmt: skip
    for folder, stored in _machines(results):
        text.append("\n".join(headline(stored)))
        if (REPOSITORY / "docs" / "images" / f"bench-{folder}-speedup.png").exists():
            text.append(f"![{PICTURES['speedup']}](docs/images/bench-{folder}-speedup.png)")
    return "\n\n".join(text)


def page(results=RESULTS):
    """The page of all results."""
    text = ["# Speed and memory", "Rendered by `python -m bench.report` from `bench/results/`; `make bench` measures anew.",
            _WORKLOADS, _COLUMNS]  # fmt: skip
    return "\n\n".join([*text, *("\n".join(details(stored, folder)) for folder, stored in _machines(results))]) + "\n"


def write(readme, results=RESULTS, images=REPOSITORY / "docs" / "images"):
    """Renders the section of `readme`, docs/results/bench.md beside it and, unless `images` is None, the pictures."""
    for folder, stored in _machines(results) if images else ():
        for kind, draw in DRAW.items():
            figure = draw(stored["rows"])
            if figure:
                figure.savefig(images / f"bench-{folder}-{kind}.png", dpi=130)
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{readme}: wanted the markers {BEGIN} and {END} around the section; add them")
    head, rest = text.split(BEGIN)
    readme.write_text(head + BEGIN + "\n" + section(results) + "\n" + END + rest.split(END)[1])
    target = readme.parent / "docs" / "results" / "bench.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(results))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "README.md")
