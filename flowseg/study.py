"""A study: the same training with different settings and seeds, scored alike, as one table and one picture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import yaml
from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flowseg.config import Count, Section, load_config, parse_section
from flowseg.errors import UserError


class Study(Section):
    """What a study file holds."""

    base: Path
    """Settings that all arms share; a path from the study's own folder."""
    steps: Count
    seeds: list[int] = Field(min_length=1)
    sample_steps: list[Count] = Field(min_length=1)
    """Numbers of Euler steps to score at; an arm that sets ``sample.steps`` itself is scored at that one alone."""
    settings: list[str] = Field(default_factory=list)
    arms: dict[str, list[str]] = Field(min_length=1)
    """Name to ``key=value`` pairs. Earlier arms run first."""


class Run:
    """One arm with one seed: a folder that ``flowseg train`` and ``flowseg evaluate`` fill."""

    def __init__(self, study: Study, arm: str, seed: int, out: Path):
        self.arm, self.seed, self.study = arm, seed, study
        self.folder = out / re.sub(r"[^a-z0-9.]+", "-", arm.lower()) / f"seed{seed}"
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
                *(["--resume"] if list(self.folder.glob("checkpoints/*")) else []),
                *(part for pair in pairs for part in ("--set", pair)),
            ]
            (self.folder / "trained").touch()
        for steps in self.sample_steps:
            if not self.score_file(steps).exists():
                target = str(self.score_file(steps))
                yield ["evaluate", "--run", str(self.folder), *where, "--steps", str(steps), "--json", target]

    def scores(self) -> dict[int, dict]:
        """Scores by number of Euler steps, of those there are."""
        found = {steps: self.score_file(steps) for steps in self.sample_steps}
        return {steps: json.loads(path.read_text()) for steps, path in found.items() if path.exists()}

    def curve(self) -> list[tuple[int, float]]:
        """``(step, mIoU)`` of the validations while training."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["miou"]) for line in lines if line["event"] == "validation"]


def load_study(path: Path) -> Study:
    """Read and check a study file, with the settings of every arm.

    Raises:
        UserError: unreadable file, or settings that an arm's training would refuse.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"study {path}: cannot be read ({' '.join(str(error).split())}); give the path of a YAML file"
        ) from None
    study = parse_section(Study, tree if isinstance(tree, dict) else {}, str(path))
    study.base = (path.parent / study.base).resolve()
    for name, pairs in study.arms.items():
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
    failed: list[str] = []
    stop = threading.Event()

    def work(run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "log.txt").open("ab") as log:
            for command in run.commands(root):
                if stop.is_set():
                    return
                done = subprocess.run(
                    [sys.executable, "-m", "flowseg", *command], stdout=log, stderr=log, env=environment, check=False
                )
                if done.returncode:
                    lines = (run.folder / "log.txt").read_text(errors="replace").splitlines()
                    failed.append(f"{run.arm}, seed {run.seed} (status {done.returncode}): " + " ".join(lines[-3:]))
                    return
        progress.advance(task)

    columns = (TextColumn("[bold]study"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("study", total=len(runs))
        try:
            list(pool.map(work, runs))
        except KeyboardInterrupt:
            stop.set()
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
    for arm, members in by_arm.items():
        scored = [run.scores() for run in members]
        cells = [_spread([one[steps]["miou"] for one in scored if steps in one]) for steps in study.sample_steps]
        best = max(scored[0], key=lambda steps: mean(one[steps]["miou"] for one in scored if steps in one))
        accuracy = _spread([one[best]["pixel_accuracy"] for one in scored if best in one])
        lines.append(f"| {arm} | {len(members)} | " + " | ".join(cells) + f" | {accuracy} ({best}) |")
    _replace(out / "table.md", ("\n".join(lines) + "\n").encode())

    figure = Figure(figsize=(9, 0.28 * len(by_arm) + 3.5), layout="constrained")
    axis = figure.subplots()
    for arm, members in by_arm.items():
        points = list(zip(*(run.curve() for run in members)))
        steps = [group[0][0] for group in points]
        values = [[miou for _, miou in group] for group in points]
        axis.plot(steps, [mean(group) for group in values], marker="o", markersize=3, label=arm)
        axis.fill_between(steps, [min(group) for group in values], [max(group) for group in values], alpha=0.12)
    axis.set(xlabel="training steps", ylabel="validation mIoU, %", ylim=(0, None))
    axis.set_title("mean over seeds; the band is from the worst to the best seed", fontsize=9)
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / ".curves.png", dpi=110)
    os.replace(out / ".curves.png", out / "curves.png")
    return out / "table.md"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
