"""The demo: train plain flow matching and FlowSeg on the embedded data, and write a report that compares them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console

from flowseg.config import Config
from flowseg.data import open_data
from flowseg.errors import UserError
from flowseg.inference.evaluate import Scores, evaluate
from flowseg.report import figures
from flowseg.report.blocks import environment, speed_blocks
from flowseg.report.page import Page, folded, paragraph, picture, table
from flowseg.report.speed import measure_kernels
from flowseg.runs.files import write_whole
from flowseg.runs.metrics import read_metrics
from flowseg.runs.progress import counting_view
from flowseg.runs.terminal import say
from flowseg.segment import Segmenter
from flowseg.training.trainer import train
from flowseg_kernels import nearest_centroid

ARMS = {"vanilla": 0.0, "FlowSeg": 1.0}
SECONDS_PER_ARM = 105.0
# Seeds differed by up to a few points at this scale: a smaller difference is called "no clear difference".
CLEAR_MIOU = 1.0


@dataclasses.dataclass
class Arm:
    """One side of the comparison, trained."""

    name: str
    config: Config
    segmenter: Segmenter
    scores: Scores
    curve: list[tuple[int, float]]
    errors: list[tuple[int, float]]
    seconds: float


def demo_config(*, quick: bool, steps: int, seed: int) -> Config:
    """Settings of both arms, without the correction weight."""
    tree = {
        # A digit is about as wide as a patch. A linear embedding of whole patches learns that in a few hundred steps.
        "model": {"size": "nano", "stem_width": 0},
        # The report shows the three channels as red, green and blue.
        "codes": {"channels": 3, "sequence": "sqrt_primes"},
        "data": {
            "name": "digits",
            "height": 64,
            "width": 64,
            "scenes_train": 20000,
            "scenes_val": 24 if quick else 200,
        },
        "optim": {"lr": 2e-3, "warmup": min(50, max(1, steps // 10))},
        "sample": {"steps": 4, "batch_size": 50},
        "train": {
            "seed": seed,
            "steps": steps,
            "batch_size": 16,
            "log_every": max(1, steps // 100),
            "eval_every": max(1, steps // (3 if quick else 10)),
            "eval_images": 12 if quick else 50,
            "checkpoint_every": steps,
            "keep": 1,
        },
    }
    return Config.model_validate(tree)


def run_demo(
    out: Path, *, quick: bool = False, steps: int | None = None, seed: int = 0, console: Console | None = None
) -> Path:
    """Train both arms with the same seed, order and steps, time the kernels, and write ``out/report.html``.

    Args:
        out: folder to write. Arms of an earlier demo in it are replaced; anything else with their names is an error.
        quick: a much shorter run that shows the form of the report, not a result.
        steps: training steps of each arm; ``None`` chooses as many as take about 105 s on this machine.
        seed: seed of weights, data, times and noise.
        console: where to print progress; ``None`` prints nothing.

    Returns:
        Path of the report. ``scene.png``, ``curves.png`` and ``report.json`` are in the same folder.

    Raises:
        UserError: a file or folder with the name of an arm is not an earlier demo's run.
        AssertionError: a kernel disagrees with the reference.
    """
    out = Path(out)
    folders = {name: out / name.lower() for name in ARMS}
    for folder in folders.values():
        _clear_run(folder)
    if steps is None:
        steps = 12 if quick else _affordable_steps(demo_config(quick=False, steps=8, seed=seed), out)
    base = demo_config(quick=quick, steps=steps, seed=seed)
    arms = [_train_arm(name, weight, base, folders[name], console) for name, weight in ARMS.items()]
    with counting_view(console, "kernels", 1) as advance:
        size = 96 if quick else 512
        speed = measure_kernels(size=size, repeats=2 if quick else 5)
        advance()
    report = out / "report.html"
    _write_report(report, arms, speed, size, quick)
    _write_numbers(out / "report.json", arms, speed)
    if console:
        say(console, verdict(arms))
    return report


def _clear_run(folder: Path) -> None:
    if folder.is_dir() and (folder / "config.yaml").is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} exists and is not a run of an earlier demo; give another folder")


def _affordable_steps(config: Config, out: Path) -> int:
    """The number of steps that fit in ``SECONDS_PER_ARM``, from a short trial: a multiple of 10 from 60 to 1500."""
    config.train.eval_images = 1
    trial = out / "trial"
    _clear_run(trial)
    train(config, trial)
    first, last = (
        line for line in read_metrics(trial / "metrics.jsonl") if line["event"] == "train" and line["step"] in (2, 8)
    )
    shutil.rmtree(trial)
    per_step = (last["seconds"] - first["seconds"]) / 6
    return min(1500, max(60, int(SECONDS_PER_ARM / per_step) // 10 * 10))


def _train_arm(name: str, weight: float, base: Config, folder: Path, console: Console | None) -> Arm:
    config = base.model_copy(deep=True)
    config.loss.correction_weight = weight
    begin = time.monotonic()
    result = train(config, folder, console=console, title=f"{name:8}")
    seconds = time.monotonic() - begin
    if isinstance(result.stopped_by, int):
        raise UserError("the demo was stopped before both runs ended; start it again")
    segmenter = Segmenter.from_run(folder, config)
    data = open_data(config.data, ("val",), seed=config.train.seed)
    with counting_view(console, f"{name:8} evaluate", len(data.val)) as advance:
        scores = evaluate(segmenter, data.val, on_batch=advance)
    lines = read_metrics(folder / "metrics.jsonl")
    errors = [(line["step"], line["squared_error"]) for line in lines if line["event"] == "train"]
    return Arm(name, config, segmenter, scores, result.curve, errors, seconds)


def verdict(arms: list[Arm]) -> str:
    """State the outcome of the comparison in one sentence."""
    vanilla, flowseg = (arm.scores.miou for arm in arms)
    steps = arms[0].config.train.steps
    numbers = f"{flowseg:.1f} % mIoU against {vanilla:.1f} % for plain flow matching after {steps} steps"
    if flowseg - vanilla >= CLEAR_MIOU:
        return f"In this run FlowSeg is better: {numbers}."
    if vanilla - flowseg >= CLEAR_MIOU:
        return f"In this run FlowSeg is not better: {numbers}."
    return f"In this run there is no clear difference: {numbers}."


def _scenes(arms: list[Arm], indices: list[int]) -> list[Figure]:
    """Draw the flow and the decoded mask of every arm for some validation scenes."""
    config = arms[0].config
    data = open_data(config.data, ("val",), seed=config.train.seed)
    drawn = []
    for index in indices:
        image, labels = data.val[index]
        paths, masks = {}, {}
        for arm in arms:
            pixels, (height, width) = arm.segmenter.prepare_batch([image])
            field, path = arm.segmenter.sample(pixels, keep_path=True)
            paths[arm.name] = [(t, x[0, :, :height, :width]) for t, x in path]
            decoded = nearest_centroid(field, arm.segmenter.codebook, out_dtype=torch.uint8)
            masks[arm.name] = decoded[0, :height, :width].cpu().numpy()
        drawn.append(figures.flow_figure(pixels[0], np.array(labels), paths, masks, data.labels))
    return drawn


def _write_report(path: Path, arms: list[Arm], speed: list[dict], size: int, quick: bool) -> None:
    page = Page(
        "FlowSeg: generative segmentation by flow matching",
        "A network learns to move an image, pixel by pixel, to a map of class colours. This page compares plain flow "
        "matching with the distance-aware correction of arXiv 2603.19218, trained and measured on this machine.",
    )
    page.cards(_cards(arms, speed))
    _add_comparison(page, path.with_name("curves.png"), arms, quick)
    _add_scenes(page, path.with_name("scene.png"), arms, count=2 if quick else 4)
    page.section(
        "What the correction changes",
        paragraph(
            "The star is the code of the true class, circles are the codes of the other classes. There are two code channels "
            "here, because two can be drawn. With the plain squared error the pull towards the true code grows with the "
            "distance and ignores the other codes. The correction also pushes away from wrong codes, most strongly close to "
            "them, which keeps an estimate from settling between two codes. Behind a wrong code, seen from the star, push and "
            "pull can cancel: those are the pale spots."
        ),
        picture(figures.vector_field_figure(), "vector field and gradient norm around a centroid"),
    )
    _add_scores(page, arms)
    page.section("Speed of the kernels", *speed_blocks(speed, size))
    page.section(
        "Settings and versions",
        paragraph("; ".join(f"{key} {value}" for key, value in environment().items())),
        folded("All settings (FlowSeg arm)", yaml.safe_dump(arms[1].config.model_dump(mode="json"), sort_keys=False)),
    )
    page.write(path)


def _cards(arms: list[Arm], speed: list[dict]) -> list[tuple[str, str]]:
    """The large numbers at the top: both scores, the length of training, and the largest speed-up."""
    vanilla, flowseg = arms
    cards = [
        (f"{vanilla.scores.miou:.1f} %", "mIoU, plain flow matching"),
        (f"{flowseg.scores.miou:.1f} %", "mIoU, FlowSeg"),
        (f"{vanilla.config.train.steps}", f"steps each, {vanilla.seconds:.0f} s and {flowseg.seconds:.0f} s"),
    ]
    if speed:
        best = max(speed, key=lambda row: row["eager_ms"] / row["ours_ms"])
        cards.append((f"{best['eager_ms'] / best['ours_ms']:.1f}x", f"{best['name']} against eager PyTorch"))
    return cards


def _add_comparison(page: Page, file: Path, arms: list[Arm], quick: bool) -> None:
    """Add the verdict and the convergence curves, which are also saved as ``file``."""
    vanilla, flowseg = arms
    caution = (
        "This was the shortened run: it shows the form of the report, and its numbers mean nothing."
        if quick
        else "This is one seed and one short run: a difference of a few points can be chance."
    )
    curves = figures.curve_figure({a.name: a.curve for a in arms}, {a.name: a.errors for a in arms})
    curves.savefig(file, dpi=110)
    page.section(
        "What came out",
        paragraph(f"{verdict(arms)} {caution}"),
        paragraph(
            f"Both arms saw the same scenes in the same order, started from the same weights and drew the same times. They "
            f"differ only in loss.correction_weight ({vanilla.config.loss.correction_weight:g} and "
            f"{flowseg.config.loss.correction_weight:g}). Scored on {vanilla.scores.images} scenes of held-out digits "
            f"on held-out parts of the photographs."
        ),
        picture(curves, "convergence curves"),
    )


def _add_scenes(page: Page, file: Path, arms: list[Arm], count: int) -> None:
    """Add the flow on the first ``count`` validation scenes; the first scene is also saved as ``file``."""
    config = arms[0].config
    scenes = _scenes(arms, list(range(min(count, config.data.scenes_val))))
    scenes[0].savefig(file, dpi=110)
    page.section(
        "The flow, step by step",
        paragraph(
            f"{config.sample.steps} Euler steps lead from the image (t = 0) to the class colours (t = 1). Then each pixel "
            f"gets the class of its nearest code. These are the first scenes of the validation set, not a selection."
        ),
        *(picture(scene, f"flow and mask of validation scene {index}") for index, scene in enumerate(scenes)),
        paragraph(
            "The states show code channels as red, green and blue; truth and masks use the colours named below them."
        ),
    )


def _add_scores(page: Page, arms: list[Arm]) -> None:
    config = arms[0].config
    classes = open_data(config.data, (), seed=config.train.seed).labels.classes
    rows = [[name, *(_percent(arm.scores.iou[k]) for arm in arms)] for k, name in enumerate(classes)]
    rows.append(["mIoU", *(_percent(arm.scores.miou) for arm in arms)])
    rows.append(["pixel accuracy", *(_percent(arm.scores.pixel_accuracy) for arm in arms)])
    page.section("Scores by class", table(["class", *(f"{arm.name}, IoU %" for arm in arms)], rows))


def _percent(value: float | None) -> str:
    return "absent" if value is None else f"{value:.1f}"


def _write_numbers(path: Path, arms: list[Arm], speed: list[dict]) -> None:
    numbers = {
        "environment": environment(),
        "arms": {
            arm.name: {
                "miou": arm.scores.miou,
                "pixel_accuracy": arm.scores.pixel_accuracy,
                "steps": arm.config.train.steps,
                "seconds": arm.seconds,
                "curve": arm.curve,
            }
            for arm in arms
        },
        "speed": speed,
    }
    write_whole(path, json.dumps(numbers, indent=1) + "\n")
