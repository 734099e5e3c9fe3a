"""A study: the same training with different settings and seeds, scored alike, as one table and one picture."""

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
from statistics import mean, stdev
from typing import Annotated

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
from flowseg.runs.metrics import read_metrics
from flowseg.runs.progress import counting_view
from flowseg.runs.signals import exit_on_signal
from flowseg.runs.terminal import printable

# Arms of a picture that have a colour of their own.
COLORED_ARMS = 5
LONGEST_FOLDER = 100


class Study(Section):
    """What a study file holds."""

    base: Path
    """Settings that all arms share; a path from the study's own folder."""
    steps: Count
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    sample_steps: list[Count] = Field(min_length=1)
    """Numbers of Euler steps to score at; an arm that sets ``sample.steps`` itself is scored at that one alone."""
    settings: list[str] = Field(default_factory=list)
    arms: dict[str, list[str]] = Field(min_length=1)
    """Name to ``key=value`` pairs. Earlier arms run first. A name may be any text."""

    @field_validator("seeds", "sample_steps")
    @classmethod
    def _once(cls, values: list[int]) -> list[int]:
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{', '.join(map(str, repeated))} given more than once; list each one once")
        return values


class Run:
    """One arm with one seed: a folder that ``flowseg train`` and ``flowseg evaluate`` fill."""

    def __init__(self, study: Study, arm: str, seed: int, out: Path):
        self.arm, self.seed, self.study = arm, seed, study
        self.folder = out / folder_names(study.arms)[arm] / f"seed{seed}"
        fixed = [int(pair.partition("=")[2]) for pair in study.arms[arm] if pair.startswith("sample.steps=")]
        self.sample_steps = fixed[-1:] or study.sample_steps

    def score_file(self, steps: int) -> Path:
        """Scores at this many Euler steps, as ``flowseg evaluate --json`` writes them."""
        return self.folder / f"val-{steps}.json"

    def commands(self, root: Path | None) -> Iterator[list[str]]:
        """What is still to be done, in order. Training that was cut goes on from its last checkpoint."""
        where = ["--root", str(root)] if root else []
        if not (self.folder / "trained").exists():
            pairs = self.study.settings + self.study.arms[self.arm]
            yield [
                *("train", "--config", str(self.study.base), *where, "--out", str(self.folder)),
                *("--steps", str(self.study.steps), "--seed", str(self.seed)),
                *(["--resume"] if list_checkpoints(self.folder) else []),
                *(part for pair in pairs for part in ("--set", pair)),
            ]
            (self.folder / "trained").touch()
        for steps in self.sample_steps:
            if not self.score_file(steps).exists():
                target = str(self.score_file(steps))
                yield ["evaluate", "--run", str(self.folder), *where, "--steps", str(steps), "--json", target]

    def check(self) -> None:
        """Refuse to take what was trained with other settings for this run's.

        Raises:
            UserError: naming the folder and the first setting that differs.
        """
        if not (self.folder / "config.yaml").is_file():
            return
        pairs = [*self.study.settings, *self.study.arms[self.arm], f"train.steps={self.study.steps}"]
        wanted = _settings(load_config(self.study.base, [*pairs, f"train.seed={self.seed}"]))
        for key, was in _settings(load_config(self.folder / "config.yaml")).items():
            if was != wanted[key]:
                raise UserError(
                    f"{self.folder} was trained with {key} = {was!r}, the study now wants {wanted[key]!r}; give a new --out, "
                    "or remove that folder to train it again"
                )

    def scores(self) -> dict[int, dict]:
        """Scores by number of Euler steps, of those there are."""
        found = {steps: self.score_file(steps) for steps in self.sample_steps}
        return {steps: json.loads(path.read_text(encoding="utf-8")) for steps, path in found.items() if path.exists()}

    def curve(self) -> list[tuple[int, float]]:
        """``(step, mIoU)`` of the validations while training."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [(line["step"], line["miou"]) for line in lines if line["event"] == "validation"]


def folder_name(arm: str) -> str:
    """Letters, digits and dots of an arm's name, joined by dashes; a name without any gives a number made from it."""
    name = re.sub(r"[^a-z0-9.]+", "-", arm.lower()).lstrip(".")
    if not re.search("[a-z0-9]", name):
        return f"arm-{_digest(arm)}"
    return name if len(name) <= LONGEST_FOLDER else f"{name[:LONGEST_FOLDER]}-{_digest(arm)}"


def folder_names(arms: Iterable[str]) -> dict[str, str]:
    """Folder of each arm; of several names that would share one, the later ones get letters and digits of their own behind it."""
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
    """Read and check a study file, with the settings of every arm.

    Raises:
        UserError: unreadable file, or settings that an arm's training would refuse.
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
            raise UserError(f"study {path}, arm {name!r}: train.seed would make all seeds one; list seeds in 'seeds'")
        try:
            load_config(study.base, study.settings + pairs)
        except UserError as error:
            raise UserError(f"study {path}, arm {name!r}: {error}") from None
    return study


def run_study(study: Study, out: Path, *, root: Path | None, jobs: int, console: Console) -> Path:
    """Train and score what is missing under ``out``, then write ``table.md`` and ``curves.png`` there.

    Finished runs are kept, cut ones resumed, so the command may be stopped and repeated, or its file extended.

    Args:
        study: what to run.
        out: folder of the study.
        root: folder of the data.
        jobs: runs at the same time, each with an equal share of the cores.
        console: where to draw progress.

    Raises:
        UserError: some runs failed; the others' results are written and the first failure's last lines are in the text.
    """
    runs = [Run(study, arm, seed, out) for arm in study.arms for seed in study.seeds]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    for run in runs:
        run.check()
    failed: list[str] = []
    stop, starting = threading.Event(), threading.Lock()
    children: set[subprocess.Popen] = set()

    def work(run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "log.txt").open("ab") as log:
            for command in run.commands(root):
                with starting:
                    if stop.is_set():
                        return
                    # In a session of its own: Ctrl-C reaches it through us once; a second signal would end it unsaved.
                    child = subprocess.Popen(
                        [sys.executable, "-m", "flowseg", *command],
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                    children.add(child)
                status = child.wait()
                children.discard(child)
                if stop.is_set():
                    return
                if status:
                    lines = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
                    failed.append(f"{run.arm}, seed {run.seed} (status {status}): " + " ".join(lines[-3:]))
                    return
        advance(1, f"{run.arm}, seed {run.seed}")

    with counting_view(console, "study", len(runs), every=True) as advance, ThreadPoolExecutor(jobs) as pool:
        try:
            with exit_on_signal():
                list(pool.map(work, runs))
        except BaseException:
            # Each saves a checkpoint and leaves; the pool waits for them.
            with starting:
                stop.set()
                for child in list(children):
                    child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    table = write_results(study, runs, out)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, the others are in {table}. First: {failed[0]}")
    return table


def write_results(study: Study, runs: list[Run], out: Path) -> Path:
    """Table of mean and spread over seeds, and the convergence picture, of the runs that are scored."""
    by_arm = {arm: [run for run in runs if run.arm == arm and run.scores()] for arm in study.arms}
    by_arm = {arm: members for arm, members in by_arm.items() if members}
    if not by_arm:
        raise UserError(f"no run under {out} is scored yet")
    head = [f"{steps} step{'s' * (steps > 1)}" for steps in study.sample_steps]
    lines = ["| arm | seeds | " + " | ".join(head) + " | pixel accuracy |", "|---|---|" + "---|" * (len(head) + 1)]
    for arm, members in zip(captioned(list(by_arm), "arm", 1), by_arm.values()):
        scored = [run.scores() for run in members]
        cells = [_spread([one[steps]["miou"] for one in scored if steps in one]) for steps in study.sample_steps]
        best = _best(scored)
        accuracy = _spread([one[best]["pixel_accuracy"] for one in scored if best in one])
        lines.append(f"| {_in_cell(arm)} | {len(members)} | " + " | ".join(cells) + f" | {accuracy} ({best}) |")
    write_whole(out / "table.md", "\n".join(lines) + "\n", errors="backslashreplace")
    with replacing(out / "curves.png") as temporary:
        _draw(by_arm).savefig(temporary, format="png", dpi=110)
    return out / "table.md"


def _in_cell(name: str) -> str:
    """A name in a cell of a Markdown table."""
    return printable(name).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _draw(by_arm: dict[str, list[Run]]) -> Figure:
    """Convergence, the first arms in colour before the others in grey; beside it every seed's final score."""
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
    curves.set_title("while training: mean of the seeds, worst to best", fontsize=9)
    font = FontProperties(family=font_families(), size=8)
    curves.legend(frameon=False, prop=font)
    finals.set_yticks(range(len(by_arm)), names, fontproperties=font)
    finals.invert_yaxis()
    finals.grid(axis="y", alpha=0.3)
    finals.set_xlabel("mIoU, %")
    finals.set_title("at the end, best number of Euler steps: seeds and mean", fontsize=9, loc="right")
    return figure


def _best(scored: list[dict[int, dict]]) -> int:
    """The number of Euler steps with the highest mean mIoU, of those that every seed was scored at if there are any."""
    everywhere = set.intersection(*map(set, scored)) or set(scored[0])
    return max(sorted(everywhere), key=lambda steps: mean(one[steps]["miou"] for one in scored if steps in one))


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
