"""The table of the last layer with many classes (`test_vocabulary.py`), for README's first screen and docs/results/bench.md."""

from collections import defaultdict

#: Arrays of one fp32 number per pixel and class that the plain head holds at once: scores, log-probabilities and their gradient in
#: training, scores in decoding.
ARRAYS = {"training": {"eager": 3, "torch.compile": 2}, "decoding": {"eager": 1, "torch.compile": 1}}
#: Entries in the order of the columns, and their names.
LABELS = {
    "eager": "K scores, PyTorch",
    "torch.compile": "K scores, torch.compile",
    "in chunks": "K scores, in chunks of pixels",
    "in chunks bf16": "K scores in bf16, in chunks of pixels",
    "ours": "16 code channels, ours",
    "ours 8 channels": "8 code channels, ours",
}
EXPLANATION = (
    "Time and peak memory of one training step (a linear layer, its loss, all gradients) and of decoding (a linear layer, the "
    "class of each pixel) from 64 features per pixel, for one image of 512 x 512 pixels. K scores: a linear layer to one score "
    "per class, `cross_entropy`, `argmax`. In chunks: the same head, which holds the scores of a part of the pixels at a time, as "
    "Liger's fused kernel does. "
    "Ours: a linear layer to 16 or 8 code channels, `flow_loss`, `nearest_centroid`. Predictions lie around the codes of their "
    "classes with a standard deviation of 0.05. Far from all codes, as early in training, decoding compares all codes. Peak "
    "memory: in addition to the features and their gradient, which both need. *Needs*: the memory for all scores, where this "
    "machine has less."
)


def needed_bytes(what, entry, classes, pixels):
    """Bytes of the arrays over all pixels and classes that an entry holds at once."""
    return ARRAYS[what].get(entry, 0) * classes * pixels * 4


def _rows(rows, what):
    return [row for row in rows if row["op"] == f"vocabulary {what}"]


def series(rows, what):
    """{entry: [(classes, row)]} in the order of LABELS; of entries on two GPU backends the faster one, under its CPU name."""
    found = defaultdict(dict)
    for row in _rows(rows, what):
        entry = row["entry"].replace(" (cuda)", "").replace(" (triton)", "")
        kept = found[entry].get(row["classes"])
        if kept is None or row["ms"] < kept["ms"]:
            found[entry][row["classes"]] = row
    order = [entry for entry in LABELS if entry in found]
    return {entry: sorted(found[entry].items()) for entry in order}


def peaks(points):
    """(classes, MB) of the points whose memory was measured; differences below 1 MB are noise of the process."""
    return [(k, max(row["peak_mib"] * 2**20 / 1e6, 1)) for k, row in points if row.get("peak_mib") is not None]


def missing(entry, measured, found, what="training"):
    """(classes, MB needed) where the entry was not measured but another one was."""
    most = {k: row["pixels"] for points in found.values() for k, row in points}
    return [
        (k, needed_bytes(what, entry, k, pixels) / 1e6)
        for k, pixels in sorted(most.items())
        if k not in measured and needed_bytes(what, entry, k, pixels)
    ]


def _amount(megabytes):
    return f"{megabytes / 1e3:,.1f} GB" if megabytes >= 1e3 else f"{megabytes:.0f} MB"


def _time(milliseconds):
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def _cell(entry, classes, pixels, found, what):
    row = dict(found.get(entry, ())).get(classes)
    if row:
        memory = peaks([(classes, row)])
        return _time(row["ms"]) + (f", {_amount(memory[0][1])}" if memory else "")
    needed = needed_bytes(what, entry, classes, pixels)
    return f"needs {_amount(needed / 1e6)}" if needed else ""


def table(rows):
    """Lines of a Markdown table: a training step and decoding per number of classes; [] if nothing was measured."""
    steps = {"training step": "training", "decoding": "decoding"}
    found = {name: series(rows, what) for name, what in steps.items()}
    entries = [entry for entry in LABELS if any(entry in members for members in found.values())]
    if not entries:
        return []
    lines = [f"| | classes | {' | '.join(LABELS[entry] for entry in entries)} |", "|---" * (len(entries) + 2) + "|"]
    for name, what in steps.items():
        for classes, row in found[name].get("ours", ()):
            cells = [_cell(entry, classes, row["pixels"], found[name], what) for entry in entries]
            lines.append(f"| {name} | {classes:,} | {' | '.join(cells)} |")
    return lines
