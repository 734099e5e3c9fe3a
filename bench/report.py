"""Render the stored results: the main workloads into README.md, everything into docs/results/bench.md, and the pictures
docs/images/bench-MACHINE-*.png. A test renders both texts again and compares them.
"""

import argparse
import pathlib
import sys

from . import targets, vocabulary
from .groups import PEERS, main_groups, table_groups
from .pictures import DRAW, PICTURES
from .results import RESULTS, ROOT, best_of_ours, groups_of, is_ours, load, times_longer

REPOSITORY = ROOT.parent
BEGIN, END = "<!-- bench table begin -->", "<!-- bench table end -->"
VOCABULARY_BEGIN, VOCABULARY_END = "<!-- vocabulary table begin -->", "<!-- vocabulary table end -->"


def _milliseconds(ours):
    """Our time in milliseconds; on a GPU followed by the backend."""
    backend = ours["entry"].partition("(")[2].partition(")")[0]
    return f"**{ours['ms']:.3g}**" + (f" {backend}" if backend else "")


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
    """The machine, its torch, the commits of its rows and the number of passes."""
    machine, rows = stored["machine"], stored["rows"]
    name = machine.get("gpu") or (
        f"{machine['model']} with {machine['threads']} threads ({machine.get('instruction_set', '')})"
    )
    marks = {f"{row['commit']}{' with uncommitted changes' if row.get('dirty') else ''}" for row in rows}
    passes = {row.get("passes", 1) for row in rows}
    counts = f"{min(passes)} to {max(passes)}" if len(passes) > 1 else f"{max(passes)}"
    times = f", best of {counts} passes" if max(passes) > 1 else ""
    return f"**{name}**, torch {machine['torch']}, commit {', '.join(sorted(marks))}{times}."


def headline(stored):
    """One machine's part of README: the main workloads against plain PyTorch and the fastest other exact peer."""
    lines = []
    for name, members in main_groups(stored["rows"]).items():
        ours = best_of_ours(members)
        # Plain PyTorch's entry of the search is called cdist+argmin.
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
    head = ("op and workload", "ours, ms", "eager", "torch.compile", "fastest other exact peer", "share of peak")
    missed = targets.missed(stored["machine"], groups_of(stored["rows"]))
    count = sum(
        target.judge(groups_of(stored["rows"]))[1] is not None for target in targets.targets_of(stored["machine"])
    )
    every = len(targets.targets_of(stored["machine"]))
    rest = f"; {every - count} more targets were not measured" if count < every else ""
    verdict = f"{count - len(missed)} of {count} targets are met{rest} ([all targets](docs/results/bench.md))"
    names = f". Missed: {'; '.join(_missed(stored))}" if 0 < len(missed) <= 4 else ""
    return [where(stored), "", *_table(head, lines), "", f"{verdict}{names}."]


def _missed(stored):
    groups = groups_of(stored["rows"])
    for target in targets.missed(stored["machine"], groups):
        yield f"{target.what} {target.shown(target.judge(groups)[0])} ({target.bound})"


def details(stored, folder):
    """One machine's part of docs/results/bench.md: every workload and peer, limits, targets and pictures."""
    groups = table_groups(stored["rows"])
    peers = [peer for peer in PEERS if any(peer in members for members in groups.values())]
    lines = []
    for name, members in groups.items():
        ours = best_of_ours(members)
        cells = [_times(members[peer], ours) if peer in members else "" for peer in peers]
        lines.append([name, _milliseconds(ours), _spread(ours), _rate(ours), _share(ours), *cells])
    head = ("op and workload", "ours, ms", "spread", "rate", "share of peak", *peers)
    text = [where(stored), "", *_table(head, lines), "", *_sentences(stored["rows"])]
    many = vocabulary.table(stored["rows"])
    text += ["", vocabulary.EXPLANATION, "", *many] if many else []
    text += ["", *targets.table(stored["machine"], groups_of(stored["rows"]))]
    for name, caption in PICTURES.items():
        if (REPOSITORY / "docs" / "images" / f"bench-{folder}-{name}.png").exists():
            text += ["", f"![{caption}](../images/bench-{folder}-{name}.png)"]
    return text


def _spread(row):
    """Half the interquartile range, in percent of the median."""
    return f"±{row['iqr_ms'] / row['ms'] / 2:.0%}" if "iqr_ms" in row else ""


def _sentences(rows):
    """Sentences about the limits, exactness, calls in alternation and host time."""
    rates = [f"{row['rate']:.3g} {row['entry']}" for row in rows if row["op"] == "machine"]
    if rates:
        yield (
            f"Limits of this machine: {', '.join(rates)}. Every part of the run measures these limits again; each row is compared "
            "with the limits of its own part."
        )
    checked = [
        row["wrong_pixels"] for row in rows if row["entry"].startswith("ours") and row.get("wrong_pixels") is not None
    ]
    if checked:
        yield f"Wrong pixels of our decoding: {sum(checked)} in {len(checked)} entries."
    pairs = [f"{row['entry']} {row['ratio']:.3g}x" for row in rows if row["op"] == "alternation"]
    if pairs:
        yield f"Ratios of two calls timed alternately (medians): {'; '.join(pairs)}."
    launched = [
        row for row in rows if is_ours(row) and "host_ms" in row and row["op"] not in ("training step", "sampling")
    ]
    if launched:
        hosts = sorted(row["host_ms"] for row in launched)
        yield (
            "Each time is that of one call in a CUDA graph of up to 50 calls. Called from Python, our ops take "
            f"{hosts[0]:.2g} to {hosts[-1]:.2g} ms of host time per call."
        )


_WORKLOADS = (
    "512 x 512 pixels, C = 3, fp32. ade512: K = 150; coco512: K = 171; many: K = 1000. Spread: standard deviation of the "
    "points around their codes. Neural field: PixNerd's decoder with Hx = 64, p = 16; L has 2 blocks, XL has 4. Training step "
    "and sampling: the nano network at 256 x 256 unless another one is named. On a CPU: one image with a random class per "
    "pixel. On a GPU: 16 images with squares of 32 x 32 pixels of one class, or a random class per pixel if the workload says "
    "so; up to 50 calls in one CUDA graph."
)
_COLUMNS = (
    "All times are medians. Every result, gradients included, was checked before it was timed. Peers: time relative to ours. "
    "Share of peak: the machine's bound for this op (memory or arithmetic, measured in the same run) divided by our time. On a "
    "GPU, ours is the faster of the two backends that were measured at the last commit; CUDA C++ is the default if both are "
    "within 10 %."
)


def _machines(results):
    """(folder name, stored results) of every machine, CPUs first."""
    parts = [(folder.name, load(folder)) for folder in sorted(results.iterdir()) if folder.is_dir()]
    return sorted((p for p in parts if p[1]), key=lambda part: ("gpu" in part[1]["machine"], part[0]))


def section(results=RESULTS):
    """The text between README's markers: the main workloads of every machine."""
    link = "[All workloads, peers, limits, targets and pictures](docs/results/bench.md)."
    text = [_WORKLOADS, f"{_COLUMNS} `make bench` measures, stores and renders this table. {link}"]
    for folder, stored in _machines(results):
        text.append("\n".join(headline(stored)))
        if (REPOSITORY / "docs" / "images" / f"bench-{folder}-speedup.png").exists():
            text.append(f"![{PICTURES['speedup']}](docs/images/bench-{folder}-speedup.png)")
    return "\n\n".join(text)


def vocabulary_section(results=RESULTS):
    """The text between README's markers of the last layer with many classes: table and picture of every machine."""
    text = []
    for folder, stored in _machines(results):
        lines = vocabulary.table(stored["rows"])
        if not lines:
            continue
        rows = [row for row in stored["rows"] if row["op"].startswith("vocabulary")]
        text += [where({**stored, "rows": rows}), "\n".join(lines)]
        if (REPOSITORY / "docs" / "images" / f"bench-{folder}-vocabulary.png").exists():
            text.append(f"![{PICTURES['vocabulary']}](docs/images/bench-{folder}-vocabulary.png)")
    return "\n\n".join([vocabulary.EXPLANATION, *text]) if text else ""


def page(results=RESULTS):
    """The text of docs/results/bench.md."""
    source = "`python -m bench report` renders this page from `bench/results/`; `make bench` measures again."
    text = ["# Speed and memory", source, _WORKLOADS, _COLUMNS]
    return "\n\n".join([*text, *("\n".join(details(stored, folder)) for folder, stored in _machines(results))]) + "\n"


def _between(text, begin, end, inserted):
    """The text with everything between two markers replaced."""
    head, rest = text.split(begin)
    return f"{head}{begin}\n{inserted}\n{end}{rest.split(end)[1]}"


def write(readme, results=RESULTS, images=REPOSITORY / "docs" / "images"):
    """Render the section of `readme`, docs/results/bench.md next to it and, unless `images` is None, the pictures."""
    for folder, stored in _machines(results) if images else ():
        for name, draw in DRAW.items():
            figure = draw(stored["rows"])
            if figure:
                figure.savefig(images / f"bench-{folder}-{name}.png", dpi=130)
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{readme}: wanted the markers {BEGIN} and {END} around the section; add them")
    text = _between(text, BEGIN, END, section(results))
    if VOCABULARY_BEGIN in text:
        text = _between(text, VOCABULARY_BEGIN, VOCABULARY_END, vocabulary_section(results))
    readme.write_text(text)
    target = readme.parent / "docs" / "results" / "bench.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(results))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    readme = REPOSITORY / "README.md"
    parser.add_argument("readme", type=pathlib.Path, nargs="?", default=readme, help="file to render (README.md)")
    write(parser.parse_args(arguments).readme)
    return 0
