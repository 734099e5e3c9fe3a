"""The targets of the project on a CPU and on a GPU: what is measured, and the wanted value.

Measured values come from stored rows only. README's table and the verdicts of the GPU report are rendered from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .results import best_of_ours, times_longer


@dataclasses.dataclass(frozen=True)
class Target:
    """One target.

    what:     its name in the rendered tables
    value:    function of {group: {entry: row}} that returns the measured value, None if it was not measured
    wanted:   the bound; an upper bound if `at_most`
    template: how a value is shown
    """

    what: str
    value: Callable
    wanted: float
    template: str = "{:.3g}x"
    at_most: bool = False

    def judge(self, groups):
        """(measured, met), both None if it was not measured."""
        measured = self.value(groups)
        if measured is None:
            return None, None
        return measured, measured <= self.wanted if self.at_most else measured >= self.wanted

    def shown(self, value):
        return "not measured" if value is None else self.template.format(value)

    @property
    def bound(self):
        return f"{'at most' if self.at_most else 'at least'} {self.template.format(self.wanted)}"


def find(groups, group, entry=None):
    members = groups.get(group, {})
    return members.get(entry) if entry else best_of_ours(members)


def ratio(over, under, key="ms"):
    """The ratio of two (group, entry); a (group,) without entry stands for our fastest entry."""

    def value(groups):
        a, b = find(groups, *over), find(groups, *under)
        if a is None or b is None or key not in a or not b.get(key):
            return None
        return times_longer(a, b) if key == "ms" else a[key] / b[key]

    return value


def peer(group, entry, wanted):
    return Target(f"{group}: time of {entry} relative to ours", ratio((group, entry), (group,)), wanted)


def faster_in_cuda(group, wanted):
    """Time of our kernel in Triton relative to the one in CUDA C++."""
    value = ratio((group, "ours (triton)"), (group, "ours (cuda)"))
    return Target(f"{group}: time in Triton relative to CUDA C++", value, wanted)


def share(group, wanted):
    def value(groups):
        row = find(groups, group)
        return row["limit_ms"] / row["ms"] if row and "limit_ms" in row else None

    return Target(f"{group}: share of peak", value, wanted, "{:.0%}")


def host_share(group, wanted):
    """Time in which Python launches one call, relative to the time on the GPU."""

    def value(groups):
        row = find(groups, group)
        return row["host_ms"] / row["ms"] if row and "host_ms" in row else None

    return Target(f"{group}: host time per call relative to GPU time", value, wanted, "{:.2g}x", at_most=True)


def wrong_pixels(groups):
    rows = [row for members in groups.values() for row in members.values() if row["entry"].startswith("ours")]
    counts = [row["wrong_pixels"] for row in rows if row.get("wrong_pixels") is not None]
    return sum(counts) if counts else None


def _peaks(groups, group, entry, peer_name):
    """Peak MiB of an entry of ours, the fastest for None, and of a peer; None if one is missing. Peaks below 1 MiB count as 1 MiB:
    they are noise of the process."""
    rows = find(groups, group, entry), find(groups, group, peer_name)
    if any(not row or "peak_mib" not in row for row in rows):
        return None
    return [max(row["peak_mib"], 1.0) for row in rows]


def memory(group, peer_name, wanted):
    """Our peak memory relative to a peer's."""

    def value(groups):
        peaks = _peaks(groups, group, None, peer_name)
        return peaks and peaks[0] / peaks[1]

    return Target(f"{group}: peak memory relative to {peer_name}", value, wanted, "{:.2f}x", at_most=True)


def times_the_memory(group, entry, peer_name, wanted):
    """A peer's peak memory relative to that of one of our entries."""

    def value(groups):
        peaks = _peaks(groups, group, entry, peer_name)
        return peaks and peaks[1] / peaks[0]

    return Target(f"{group}: peak memory of {peer_name} relative to {entry}", value, wanted)


def peak_megabytes(group, wanted):
    """Our peak memory in 10^6 bytes."""

    def value(groups):
        row = find(groups, group)
        return row["peak_mib"] * 2**20 / 1e6 if row and "peak_mib" in row else None

    return Target(f"{group}: peak memory of ours", value, wanted, "{:.0f} MB", at_most=True)


_CORRECTION, _LOSS = "distance_correction ade512", "flow_loss forward+backward ade512"
_FIELD = "neural_field {} XL 256 patches {}"


def _search(spread, workload="ade512"):
    return f"nearest_centroid {workload} spread {spread:g}"


def in_alternation(pair, wanted, template="{:.3g}x", at_most=False):
    """Ratio of two calls timed alternately; timing them one after the other would measure drift of the machine."""

    def value(groups):
        row = find(groups, "calls in alternation", pair)
        return row and row["ratio"]

    return Target(pair, value, wanted, template, at_most)


def _of_bf16(group):
    # 1.02 means "not slower": two medians of the same code differ by 2 %.
    return in_alternation(f"{group}: bf16 against fp32", 1.02, "{:.2f}x", at_most=True)


def _vocabulary(ours):
    """Targets of the last layer with many classes; `ours` names the entry with 16 channels.

    In 16 channels the arrays of a step are prediction and residual: 32 numbers per pixel. The head has 3 K, which is 3 K / 32 times
    ours: 94 times at K = 1000. In 8 channels it is 3 K / 16.
    """
    for classes, faster, least_of_16, least_of_8 in ((1000, 15, 90, 150), (3000, 40, 270, 500)):
        group = f"vocabulary training K={classes}"
        yield peer(group, "eager", faster)
        yield times_the_memory(group, ours, "eager", least_of_16)
        yield times_the_memory(group, f"{ours} 8 channels", "eager", least_of_8)
    for classes in (10000, 65536):
        for what in ("training", "decoding"):
            yield peak_megabytes(f"vocabulary {what} K={classes}", 200)


def _many_channels():
    """Targets of decoding in 8 and 16 channels."""
    for channels in (8, 16):
        for kind in ("squares", "random", "photographs"):
            group = f"nearest_centroid C={channels} K={{}} {kind} spread 0.05"
            for classes, faster in ((150, 5), (1000, 5)) if kind == "random" else ((150, 10), (1000, 40)):
                yield peer(group.format(classes), "faiss IndexFlatL2", faster)
            yield peer(group.format(20000), "scipy cKDTree", 1)
            pair = f"nearest_centroid C = {channels} {kind}: K = 1000 against K = 150"
            yield in_alternation(pair, 1.7, at_most=True)


CPU = (
    share(_CORRECTION, 0.8),
    peer(_CORRECTION, "torch.compile", 60),
    peer(_CORRECTION, "KeOps", 22),
    peer(_CORRECTION, "eager", 330),
    share(_LOSS, 0.8),
    peer(_LOSS, "torch.compile", 60),
    peer(_search(0.05), "faiss IndexFlatL2", 20),
    peer(_search(0.05), "scipy cKDTree", 60),
    peer(_search(0.1), "faiss IndexFlatL2", 7),
    peer(_search(0.3), "faiss IndexFlatL2", 4.5),
    *(
        in_alternation(f"nearest_centroid spread {spread}: K = 1000 against K = 150", 1.7, at_most=True)
        for spread in (0.05, 0.1, 0.3)
    ),
    Target("wrong pixels of our decoding", wrong_pixels, 0, "{:.0f}", at_most=True),
    *(
        in_alternation(f"decode_confusion {of}: against nearest_centroid", 2.5, at_most=True)
        for of in ("ade512 spread 0.1", "many spread 0.05")
    ),
    _of_bf16(_CORRECTION),
    *(_of_bf16(_search(spread)) for spread in (0.05, 0.1, 0.3)),
    *(in_alternation(f"{op} ade512: 1 thread against 2", 1.8) for op in ("distance_correction", "nearest_centroid")),
    peer(_FIELD.format("forward", "float32"), "torch.compile", 1.3),
    peer(_FIELD.format("forward+backward", "float32"), "torch.compile", 1.1),
    in_alternation("neural_field forward XL 256 patches float32: eager against ours", 3),
    in_alternation("neural_field forward+backward XL 256 patches float32: eager against ours", 2),
    *(
        in_alternation(f"neural_field {what} XL 256 patches of ours: fp32 against bf16", 1.5)
        for what in ("forward", "forward+backward")
    ),
    memory("neural_field forward+backward XL 1024 patches float32", "eager", 0.2),
    peer("training step nano", "eager", 1),
    peer("sampling nano", "eager", 1),
    *_vocabulary("ours"),
    *_many_channels(),
    *(
        in_alternation(f"nearest_centroid C = 3 K = {classes}: with margin against without", 3, at_most=True)
        for classes in (150, 1000, 20000)
    ),
)

_RANDOM = "ade512 random"
_STEP = "training step L/16 512 batch 16 bf16"
_FIELD_GPU = "neural_field {} {} 4096 patches bfloat16"

GPU = (
    share(_CORRECTION, 0.75),
    peer(_CORRECTION, "torch.compile", 8),
    peer(_CORRECTION, "eager", 40),
    peer(_CORRECTION, "KeOps", 8),
    share(_LOSS, 0.75),
    *(share(_search(spread), 0.85) for spread in (0.05, 0.1, 0.3)),
    *(share(_search(spread, _RANDOM), 0.6) for spread in (0.05, 0.1, 0.3)),
    *(share(_search(spread / 2, "many"), 0.85) for spread in (0.05, 0.1, 0.3)),
    peer(_search(0.3), "cdist+argmin compiled", 10),
    *(peer(_search(spread), "flash-kmeans", 5) for spread in (0.05, 0.1, 0.3)),
    Target("wrong pixels of our decoding", wrong_pixels, 0, "{:.0f}", at_most=True),
    *(
        peer(_FIELD_GPU.format(what, "XL"), name, wanted)
        for what, name, wanted in (
            ("forward", "eager", 4),
            ("forward", "torch.compile", 2),
            ("forward+backward", "eager", 3),
            ("forward+backward", "torch.compile", 1.5),
        )
    ),
    *(share(_FIELD_GPU.format(what, model), 0.6) for what in ("forward", "forward+backward") for model in ("L", "XL")),
    *(faster_in_cuda(_FIELD_GPU.format(what, "XL"), 2) for what in ("forward", "forward+backward")),
    host_share(_FIELD_GPU.format("forward+backward", "XL"), 1 / 3),
    memory(_FIELD_GPU.format("forward+backward", "XL"), "eager", 1 / 6),
    peer(_STEP, "eager", 1.3),
    peer(_STEP, "torch.compile", 1.08),
    peer("sampling L/16 512 batch 16 bf16", "eager", 1.15),
    peer("training step nano", "eager", 1.3),
    peer("sampling nano", "eager", 1.3),
    *_vocabulary("ours (cuda)"),
)


def targets_of(machine):
    return GPU if "gpu" in machine else CPU


def missed(machine, groups):
    """The targets that were measured and missed."""
    return [target for target in targets_of(machine) if target.judge(groups)[1] is False]


def table(machine, groups):
    """Lines of a Markdown table: target, wanted, measured, met."""
    yield "| target | wanted | measured | met |"
    yield "|---|---|---|---|"
    for target in targets_of(machine):
        measured, met = target.judge(groups)
        verdict = {None: "", True: "yes", False: "**no**"}[met]
        yield f"| {target.what} | {target.bound} | {target.shown(measured)} | {verdict} |"
