"""A study: the same training with different settings and seeds, scored alike, as one table and one picture."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
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

from flowseg.checkpoint import list_checkpoints
from flowseg.config import Config, Count, Section, load_config, parse_section
from flowseg.errors import UserError

# Arms of a picture that have a colour of their own.
COLORED_ARMS = 5


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
        self.folder = out / folder_name(arm) / f"seed{seed}"
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
        return {steps: json.loads(path.read_text()) for steps, path in found.items() if path.exists()}

    def curve(self) -> list[tuple[int, float]]:
        """``(step, mIoU)`` of the validations while training."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["miou"]) for line in lines if line["event"] == "validation"]


def folder_name(arm: str) -> str:
    """Letters, digits and dots of an arm's name, joined by dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower())


def _settings(config: Config) -> dict[str, object]:
    """Dotted settings, less those of a place and a machine."""
    tree = config.model_dump(mode="json")
    flat = {f"{section}.{leaf}": value for section, fields in tree.items() for leaf, value in fields.items()}
    return {key: value for key, value in flat.items() if key not in ("data.root", "train.mixed_precision")}


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
    folders: dict[str, str] = {}
    for name, pairs in study.arms.items():
        if (other := folders.setdefault(folder_name(name), name)) != name:
            raise UserError(
                f"study {path}: arms {other!r} and {name!r} would share the folder {folder_name(name)!r}; rename one"
            )
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
                    lines = (run.folder / "log.txt").read_text(errors="replace").splitlines()
                    failed.append(f"{run.arm}, seed {run.seed} (status {status}): " + " ".join(lines[-3:]))
                    return
        progress.advance(task)

    columns = (TextColumn("[bold]study"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("study", total=len(runs))
        try:
            with _terminated_is_interrupted():
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


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM as :class:`SystemExit`, so that the runs are told too."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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
        best = _best(scored)
        accuracy = _spread([one[best]["pixel_accuracy"] for one in scored if best in one])
        lines.append(f"| {arm} | {len(members)} | " + " | ".join(cells) + f" | {accuracy} ({best}) |")
    _replace(out / "table.md", ("\n".join(lines) + "\n").encode())

    _draw(by_arm).savefig(out / ".curves.png", dpi=110)
    os.replace(out / ".curves.png", out / "curves.png")
    return out / "table.md"


def _draw(by_arm: dict[str, list[Run]]) -> Figure:
    """Convergence, the first arms in colour before the others in grey; beside it every seed's final score."""
    figure = Figure(figsize=(11, max(4.0, 0.24 * len(by_arm) + 1.5)), layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for place, (arm, members) in enumerate(by_arm.items()):
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
    curves.legend(frameon=False, fontsize=8)
    finals.set_yticks(range(len(by_arm)), list(by_arm), fontsize=8)
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


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
