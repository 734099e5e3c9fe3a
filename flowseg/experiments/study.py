"""A study: train with different settings (arms) and seeds, score all runs alike, and write one table and one picture."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, NamedTuple

import yaml
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from pydantic import Field, field_validator
from rich.console import Console

from flowseg.checkpoint import list_checkpoints
from flowseg.config import Config, Count, Section, load_config, parse_section, read_yaml
from flowseg.errors import UserError
from flowseg.report.names import captioned, drawable, font_families
from flowseg.runs.files import replacing, write_whole
from flowseg.runs.machine import usable_cores
from flowseg.runs.metrics import read_metrics
from flowseg.runs.progress import counting_view
from flowseg.runs.signals import exit_on_signal
from flowseg.runs.terminal import printable
from flowseg.training.batches import examples_per_step

# The first arms of the picture have colours; all later ones are grey.
COLORED_ARMS = 5
LONGEST_FOLDER = 100


class Study(Section):
    """The content of a study file."""

    base: Path
    """File of the settings that all arms share; relative to the folder of the study file."""
    steps: Count
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    sample_steps: list[Count] = Field(min_length=1)
    """Numbers of Euler steps to score with. An arm that sets ``sample.steps`` is scored only with that number."""
    settings: list[str] = Field(default_factory=list)
    arms: dict[str, list[str]] = Field(min_length=1)
    """Name of each arm, which may be any text, to its ``key=value`` pairs. Earlier arms run first."""

    @field_validator("seeds", "sample_steps")
    @classmethod
    def _once(cls, values: list[int]) -> list[int]:
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{', '.join(map(str, repeated))} given more than once; list each one once")
        return values


class Cost(NamedTuple):
    """Time and memory of training.

    Attributes:
        step_ms: milliseconds per training step, the median of the logged lines: making the scenes or reading the images is
            part of it, validations and checkpoints are not.
        memory_gib: the most memory of tensors on the accelerator; without one, of the whole process, in GiB. ``None`` if
            the run has not logged it.
    """

    step_ms: float
    memory_gib: float | None


class Run:
    """One arm with one seed. ``flowseg train`` and ``flowseg evaluate`` fill its folder."""

    def __init__(self, study: Study, arm: str, seed: int, out: Path):
        self.arm, self.seed, self.study = arm, seed, study
        self.folder = out / folder_names(study.arms)[arm] / f"seed{seed}"
        fixed = [int(pair.partition("=")[2]) for pair in study.arms[arm] if pair.startswith("sample.steps=")]
        self.sample_steps = fixed[-1:] or study.sample_steps

    def score_file(self, steps: int) -> Path:
        """Path of the scores with ``steps`` Euler steps, which ``flowseg evaluate --json`` writes."""
        return self.folder / f"val-{steps}.json"

    def commands(self, root: Path | None) -> Iterator[list[str]]:
        """Give the commands that are still to be run, in order. Interrupted training resumes from its last checkpoint."""
        data = ["--root", str(root)] if root else []
        if not (self.folder / "trained").exists():
            pairs = self.study.settings + self.study.arms[self.arm]
            yield [
                *("train", "--config", str(self.study.base), *data, "--out", str(self.folder)),
                *("--steps", str(self.study.steps), "--seed", str(self.seed)),
                *(["--resume"] if list_checkpoints(self.folder) else []),
                *(part for pair in pairs for part in ("--set", pair)),
            ]
            (self.folder / "trained").touch()
        for steps in self.sample_steps:
            if not self.score_file(steps).exists():
                target = str(self.score_file(steps))
                yield ["evaluate", "--run", str(self.folder), *data, "--steps", str(steps), "--json", target]

    def config(self) -> Config:
        """The settings of this run."""
        pairs = [*self.study.settings, *self.study.arms[self.arm], f"train.steps={self.study.steps}"]
        return load_config(self.study.base, [*pairs, f"train.seed={self.seed}"])

    def check(self) -> None:
        """Refuse a folder that was trained with other settings than this run's.

        Raises:
            UserError: naming the folder and the first setting that differs.
        """
        if not (self.folder / "config.yaml").is_file():
            return
        wanted = _settings(self.config())
        for key, was in _settings(load_config(self.folder / "config.yaml")).items():
            if was != wanted[key]:
                raise UserError(
                    f"{self.folder} was trained with {key} = {was!r}, the study now has {wanted[key]!r}; give a new --out, "
                    "or delete that folder to train it again"
                )

    def scores(self) -> dict[int, dict]:
        """Read the scores that exist, by number of Euler steps."""
        found = {steps: self.score_file(steps) for steps in self.sample_steps}
        return {steps: json.loads(path.read_text(encoding="utf-8")) for steps, path in found.items() if path.exists()}

    def curve(self) -> list[tuple[int, float]]:
        """``(step, mIoU)`` of each validation during training."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [(line["step"], line["miou"]) for line in lines if line["event"] == "validation"]

    def cost(self) -> Cost | None:
        """Time and memory of training, from its log; ``None`` if that has no line of a step."""
        lines = [line for line in read_metrics(self.folder / "metrics.jsonl") if line["event"] == "train"]
        if not lines:
            return None
        config = self.config()
        speeds = [line["images_per_second"] / examples_per_step(config.at_step(line["step"] - 1), 1) for line in lines]
        peaks = [peak for line in lines if (peak := line.get("memory_gib", line.get("process_gib"))) is not None]
        return Cost(1000 / median(speeds), max(peaks, default=None))


def folder_name(arm: str) -> str:
    """The letters, digits and dots of an arm's name, joined by dashes; if it has none, ``arm-`` and a hash of the name."""
    name = re.sub(r"[^a-z0-9.]+", "-", arm.lower()).lstrip(".")
    if not re.search("[a-z0-9]", name):
        return f"arm-{_digest(arm)}"
    return name if len(name) <= LONGEST_FOLDER else f"{name[:LONGEST_FOLDER]}-{_digest(arm)}"


def folder_names(arms: Iterable[str]) -> dict[str, str]:
    """The folder of each arm. If several names give the same folder, a hash is appended for the later ones."""
    folders: dict[str, str] = {}
    for arm in arms:
        name = folder_name(arm)
        folders[arm] = f"{name}-{_digest(arm)}" if name in folders.values() else name
    return folders


def _digest(arm: str) -> str:
    return hashlib.sha256(arm.encode("utf-8", "backslashreplace")).hexdigest()[:8]


def _settings(config: Config) -> dict[str, object]:
    """Settings as ``{"section.name": value}``, without those that depend on the machine."""
    return {key: value for key, value in config.flat().items() if key not in ("data.root", "train.mixed_precision")}


def load_study(path: Path) -> Study:
    """Read a study file and check it, including the settings of every arm.

    Raises:
        UserError: the file cannot be read, or the training of an arm would refuse its settings.
    """
    try:
        tree = read_yaml(path)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"study {path}: cannot be read ({' '.join(str(error).split())}); give the path of a YAML file"
        ) from None
    study = parse_section(Study, tree if isinstance(tree, dict) else {}, str(path))
    study.base = (path.parent / study.base).resolve()
    for name, pairs in study.arms.items():
        if any(pair.partition("=")[0].strip() == "train.seed" for pair in study.settings + pairs):
            raise UserError(
                f"study {path}, arm {name!r}: train.seed would give all runs the same seed; list the seeds in 'seeds'"
            )
        try:
            load_config(study.base, study.settings + pairs)
        except UserError as error:
            raise UserError(f"study {path}, arm {name!r}: {error}") from None
    return study


def run_study(study: Study, out: Path, *, root: Path | None, jobs: int, console: Console) -> Path:
    """Train and score the runs that are missing under ``out``, then write ``table.md`` and ``curves.png`` there.

    Finished runs are kept and interrupted ones are resumed: the command may be stopped and repeated, and arms may be added.

    Args:
        study: the arms and seeds to run.
        out: folder of the study.
        root: folder of the data.
        jobs: number of runs at the same time, which share the cores equally.
        console: where to print progress.

    Raises:
        UserError: some runs failed. The results of the others are written, and the message quotes the first failure.
    """
    runs = [Run(study, arm, seed, out) for arm in study.arms for seed in study.seeds]
    for run in runs:
        run.check()
    failed: list[str] = []
    commands = _Commands(threads=max(1, usable_cores() // jobs))

    def work(run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "log.txt"
        for command in run.commands(root):
            status = commands.run(command, log)
            if status is None:
                return
            if status:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                failed.append(f"{run.arm}, seed {run.seed} (status {status}): " + " ".join(lines[-3:]))
                return
        advance(1, f"{run.arm}, seed {run.seed}")

    with counting_view(console, "study", len(runs), every=True) as advance, ThreadPoolExecutor(jobs) as pool:
        try:
            with exit_on_signal():
                list(pool.map(work, runs))
        except BaseException:
            # The running commands save their checkpoints and exit; leaving the pool waits for them.
            commands.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    table = write_results(study, runs, out)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed; the results of the others are in {table}. First: {failed[0]}"
        )
    return table


class _Commands:
    """``flowseg`` commands in processes with ``threads`` threads each, which can be stopped together."""

    def __init__(self, threads: int):
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._running: set[subprocess.Popen] = set()
        # The lock makes sure that no process starts after stop() has listed the running ones.
        self._starting, self._stopped = threading.Lock(), False

    def run(self, command: list[str], log: Path) -> int | None:
        """Run one command, append its output to ``log`` and return its status; None if :meth:`stop` was called."""
        with log.open("ab") as output:
            with self._starting:
                if self._stopped:
                    return None
                # A new session: Ctrl-C in the terminal must not reach the process directly, as stop() signals it too, and a
                # second signal would end it unsaved.
                process = subprocess.Popen(
                    [sys.executable, "-m", "flowseg", *command],
                    stdout=output,
                    stderr=output,
                    env=self._environment,
                    start_new_session=True,
                )
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
            return None if self._stopped else status

    def stop(self) -> None:
        """Ask all running commands to end, and start no more."""
        with self._starting:
            self._stopped = True
            for process in list(self._running):
                process.terminate()


def write_results(study: Study, runs: list[Run], out: Path) -> Path:
    """Write a table and the picture for the runs that have scores.

    The table has the mean and the standard deviation over seeds of the scores, the time per training step and the memory.
    """
    by_arm = {arm: [run for run in runs if run.arm == arm and run.scores()] for arm in study.arms}
    by_arm = {arm: members for arm, members in by_arm.items() if members}
    if not by_arm:
        raise UserError(f"no run under {out} has scores yet")
    head = [f"{steps} step{'s' * (steps > 1)}" for steps in study.sample_steps]
    head += ["pixel accuracy", "ms per training step", "peak memory, GiB"]
    lines = ["| arm | seeds | " + " | ".join(head) + " |", "|---|---|" + "---|" * len(head)]
    for arm, members in zip(captioned(list(by_arm), "arm", 1), by_arm.values()):
        scored = [run.scores() for run in members]
        cells = [_spread([one[steps]["miou"] for one in scored if steps in one]) for steps in study.sample_steps]
        best = _best(scored)
        accuracy = _spread([one[best]["pixel_accuracy"] for one in scored if best in one])
        costs = [cost for run in members if (cost := run.cost())]
        times = _spread([cost.step_ms for cost in costs], digits=0)
        memory = _spread([cost.memory_gib for cost in costs if cost.memory_gib is not None], digits=2)
        cells += [f"{accuracy} ({best})", times, memory]
        lines.append(f"| {_in_cell(arm)} | {len(members)} | " + " | ".join(cells) + " |")
    write_whole(out / "table.md", "\n".join(lines) + "\n", errors="backslashreplace")
    with replacing(out / "curves.png") as temporary:
        _draw(by_arm).savefig(temporary, format="png", dpi=110)
    return out / "table.md"


def _in_cell(name: str) -> str:
    """Escape a name for a cell of a Markdown table."""
    return printable(name).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _draw(by_arm: dict[str, list[Run]]) -> Figure:
    """Draw convergence on the left, the first arms in colour and all others in grey, and all final scores on the right."""
    figure = Figure(figsize=(11, max(4.0, 0.24 * len(by_arm) + 1.5)), layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(1.2, 1))
    names = drawable(list(by_arm), "arm", 1)
    for place, (arm, members) in enumerate(zip(names, by_arm.values())):
        color = f"C{place}" if place < COLORED_ARMS else "0.75"
        points = list(zip(*(run.curve() for run in members)))
        steps = [group[0][0] for group in points]
        values = [[miou for _, miou in group] for group in points]
        front = {"color": color, "zorder": 2 + (place < COLORED_ARMS)}
        label = arm if place < COLORED_ARMS else "the others" if place == COLORED_ARMS else None
        curves.plot(steps, [mean(group) for group in values], marker="o", markersize=3, label=label, **front)
        if place < COLORED_ARMS:
            curves.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.15, color=color)
        best = _best([run.scores() for run in members])
        scores = [run.scores()[best]["miou"] for run in members if best in run.scores()]
        finals.plot(scores, [place] * len(scores), "o", markersize=4, alpha=0.6, color=color)
        finals.plot([mean(scores)], [place], "|", markersize=12, markeredgewidth=2, color=color)
    curves.set(xlabel="training steps", ylabel="validation mIoU, %", ylim=(0, None))
    curves.set_title("during training: mean of the seeds, worst to best", fontsize=9)
    font = FontProperties(family=font_families(), size=8)
    curves.legend(frameon=False, prop=font)
    finals.set_yticks(range(len(by_arm)), names, fontproperties=font)
    finals.invert_yaxis()
    finals.grid(axis="y", alpha=0.3)
    finals.set_xlabel("mIoU, %")
    finals.set_title("at the end, best number of Euler steps: seeds and mean", fontsize=9, loc="right")
    return figure


def _best(scored: list[dict[int, dict]]) -> int:
    """The number of Euler steps with the highest mean mIoU, among those that every seed has scores for if there are any."""
    everywhere = set.intersection(*map(set, scored)) or set(scored[0])
    return max(sorted(everywhere), key=lambda steps: mean(one[steps]["miou"] for one in scored if steps in one))


def _spread(values: list[float], digits: int = 1) -> str:
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
