"""The ``flowseg`` command."""

from __future__ import annotations

import errno
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowseg import __version__
from flowseg.errors import UserError

app = typer.Typer(
    help="Generative segmentation by flow matching: train, evaluate, predict, and a demo that needs no data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Typer reads the annotations at run time, so the settings' heavy modules are imported inside the commands only.
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. optim.lr=3e-4.")]


class DataName(str, Enum):
    """Data sets known by name."""

    digits = "digits"
    camvid = "camvid"
    ade20k = "ade20k"
    cocostuff = "cocostuff"
    cityscapes = "cityscapes"
    voc = "voc"
    folder = "folder"


class Split(str, Enum):
    """Splits that can be evaluated."""

    train = "train"
    val = "val"


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and status 2."""
    try:
        app()
    except UserError as error:
        _leave(str(error))
    except OSError as error:
        # A full disk or a folder that cannot be written can show at any write; other ones are ours to explain.
        if error.errno not in _NOT_WRITABLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _leave(f"{place}cannot be written ({error.strerror}); free disk space or give another folder, then --resume")


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def _leave(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(2)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"flowseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo_out"),
    quick: Annotated[bool, typer.Option("--quick", help="Shortened: the form of the report, not a result.")] = False,
    steps: Annotated[Optional[int], typer.Option(min=4, help="Training steps of each arm.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data and draws.")] = 0,
) -> None:
    """Train vanilla flow matching and FlowSeg on embedded data and write one HTML report. Needs no download."""
    from flowseg.demo import run_demo

    report = run_demo(out, quick=quick, steps=steps, seed=seed, console=Console(stderr=True))
    typer.echo(f"report: {report.resolve()}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    config: Annotated[Optional[Path], typer.Option(help="YAML with settings.")] = None,  # noqa: UP045
    data: Annotated[Optional[DataName], typer.Option(help="Data set.")] = None,  # noqa: UP045
    root: Annotated[Optional[Path], typer.Option(help="Folder of the data.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="nano, S, B, L or XL.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(help="Optimiser steps.")] = None,  # noqa: UP045
    max_minutes: Annotated[Optional[float], typer.Option(help="Stop after this many minutes.")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(help="Images a step and process.")] = None,  # noqa: UP045
    lr: Annotated[Optional[float], typer.Option(help="Learning rate.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Of weights, order, crops, times.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Train a model. Settings come from --config (or, with --resume, from the run), then flags, then --set."""
    from flowseg.config import load_config
    from flowseg.train import train as run_training

    flags = {
        "data.name": data.value if data else None,
        "data.root": _absolute(root),
        "model.size": model,
        "train.steps": steps,
        "train.max_minutes": max_minutes,
        "train.batch_size": batch_size,
        "optim.lr": lr,
        "train.seed": seed,
    }
    if resume and config is None and (out / "config.yaml").is_file():
        config = out / "config.yaml"
    settings = load_config(config, sets, flags)
    console = Console(stderr=True)
    console.print(f"flowseg {__version__}  {settings.data.name}  {settings.model.size}  -> {out}", highlight=False)
    if settings.train.steps < 2 * settings.optim.warmup:
        console.print(
            f"note: {settings.train.steps} steps are short for a warm-up of {settings.optim.warmup}; "
            "lower it with --set optim.warmup=N",
            highlight=False,
        )
    result = run_training(settings, out, resume=resume, console=console)
    if isinstance(result.stopped_by, int):
        console.print(f"stopped by signal at step {result.state.step}; go on with: flowseg train --out {out} --resume")
        raise typer.Exit(128 + result.stopped_by)
    scores = result.scores
    console.print(
        f"step {result.state.step} (ended by {result.stopped_by}): mIoU {scores.miou:.2f}, pixel accuracy "
        f"{scores.pixel_accuracy:.2f} on {scores.images} images; best mIoU {result.state.best_miou:.2f}",
        highlight=False,
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Option(help="Run folder.")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, a step, or a .safetensors file.")] = "latest",
    root: Annotated[Optional[Path], typer.Option(help="Folder of the data, if it moved.")] = None,  # noqa: UP045
    split: Annotated[Split, typer.Option(help="Which split.")] = Split.val,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Only this many images.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(help="ODE steps.")] = None,  # noqa: UP045
    method: Annotated[Optional[str], typer.Option(help="euler, heun or midpoint.")] = None,  # noqa: UP045
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Also write the scores here.")] = None,  # noqa: UP045
    sets: Sets = [],  # noqa: B006
) -> None:
    """Score a run on a split: mIoU, pixel accuracy, a table by class. Under `accelerate launch` processes share the work."""
    import torch
    from accelerate import PartialState

    from flowseg.checkpoint import read_run_config
    from flowseg.data import open_data
    from flowseg.evaluate import chosen_indices
    from flowseg.evaluate import evaluate as score
    from flowseg.parallel import Peers
    from flowseg.segment import Segmenter

    state = PartialState(cpu=not torch.accelerator.is_available())
    settings = read_run_config(
        run, sets, {"data.root": _absolute(root), "sample.steps": steps, "sample.method": method}
    )
    data = open_data(settings.data, (split.value,), seed=settings.train.seed)
    pairs = data.train if split is Split.train else data.val
    segmenter = Segmenter.from_run(run, settings, checkpoint)
    with _bar("evaluate", len(chosen_indices(len(pairs), limit)), shown=state.is_main_process) as advance:
        scores = score(
            segmenter,
            pairs,
            limit=limit,
            on_batch=lambda count: advance(count * state.num_processes),
            rank=state.process_index,
            world=state.num_processes,
            add_up=Peers(state.num_processes).add_up_counts,
        )
    if not state.is_main_process:
        return
    table = Table("class", "IoU %", title=f"{run} on {split.value} ({scores.images} images)")
    for name, value in zip(data.labels.classes, scores.iou):
        table.add_row(name, "absent" if value is None else f"{value:.2f}")
    table.add_section()
    table.add_row("mIoU", f"{scores.miou:.2f}")
    table.add_row("pixel accuracy", f"{scores.pixel_accuracy:.2f}")
    Console().print(table)
    if json_file:
        facts = scores.summary(data.labels.classes)
        facts |= {"split": split.value, "checkpoint": checkpoint, "sample": settings.sample.model_dump()}
        temporary = json_file.with_name(f".{json_file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(temporary, json_file)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Optional[Path], typer.Option(help="File to write; default report.html in the run.")] = None,  # noqa: UP045
    checkpoint: Annotated[str, typer.Option(help="latest, best, a step, or a .safetensors file.")] = "latest",
    root: Annotated[Optional[Path], typer.Option(help="Folder of the data, if it moved.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(min=1, help="Score only this many images.")] = None,  # noqa: UP045
    speed: Annotated[bool, typer.Option(help="Also time the kernels.")] = True,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Write one HTML file about a run: convergence, classes, confusion, examples, trajectories, settings, speed."""
    from flowseg.checkpoint import read_run_config
    from flowseg.report.run import write_report
    from flowseg.segment import Segmenter

    settings = read_run_config(run, sets, {"data.root": _absolute(root)})
    segmenter = Segmenter.from_run(run, settings, checkpoint)
    target = out or run / "report.html"
    with _bar("report", limit) as advance:
        scores = write_report(run, segmenter, target, limit=limit, kernel_size=256 if speed else None, on_batch=advance)
    typer.echo(f"report: {target.resolve()}  (mIoU {scores.miou:.2f} on {scores.images} images)")


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, a step, or a .safetensors file.")] = "latest",
    scores: Annotated[Optional[Path], typer.Option(help="What 'evaluate --json' wrote, for the card.")] = None,  # noqa: UP045
    license: Annotated[Optional[str], typer.Option(help="Of the weights, for the card.")] = None,  # noqa: UP045
    sets: Sets = [],  # noqa: B006
) -> None:
    """Write weights, settings and a model card that can be shared; `flowseg predict --run` takes the folder too."""
    from flowseg.checkpoint import read_run_config
    from flowseg.hub import save_pretrained
    from flowseg.segment import Segmenter

    segmenter = Segmenter.from_run(run, read_run_config(run, sets), checkpoint, "cpu")
    try:
        measured = json.loads(scores.read_text()) if scores else None
    except (OSError, ValueError) as error:
        raise UserError(f"--scores {scores}: cannot be read as JSON ({error})") from None
    typer.echo(f"written: {save_pretrained(segmenter, out, scores=measured, license=license)}")


@app.command()
def predict(
    inputs: Annotated[list[str], typer.Argument(help="Images, folders or glob patterns.")],
    run: Annotated[str, typer.Option(help="Run folder, folder of 'flowseg export', or a name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, a step, or a .safetensors file.")] = "latest",
    overlay: Annotated[bool, typer.Option(help="Write overlays too.")] = True,
    margin: Annotated[bool, typer.Option(help="Write margin maps too.")] = False,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the colours in overlays.")] = 0.5,
    steps: Annotated[Optional[int], typer.Option(help="ODE steps.")] = None,  # noqa: UP045
    sets: Sets = [],  # noqa: B006
) -> None:
    """Segment images: a palette PNG each, overlays, and on request margin maps."""
    from flowseg.checkpoint import read_run_config
    from flowseg.data.datasets import resolve_labels
    from flowseg.hub import from_pretrained, is_shared
    from flowseg.predict import find_images
    from flowseg.predict import predict as segment_files
    from flowseg.segment import Segmenter

    shared = not (Path(run) / "config.yaml").is_file() and is_shared(run)
    settings = None if shared else read_run_config(Path(run), sets, {"sample.steps": steps})
    images = find_images(inputs)
    if shared:
        segmenter = from_pretrained(run, sets + ([] if steps is None else [f"sample.steps={steps}"]))
    else:
        segmenter = Segmenter.from_run(Path(run), settings, checkpoint)
    outputs = ["mask"] + ["overlay"] * overlay + ["margin"] * margin
    with _bar("predict", len(images)) as advance:
        result = segment_files(
            segmenter,
            images,
            out,
            resolve_labels(segmenter.config.data).palette,
            outputs=outputs,
            opacity=opacity,
            on_image=lambda _: advance(1),
        )
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{len(images) - len(result.failed)} of {len(images)} images -> {out}", highlight=False)
    for path, reason in result.failed:
        console.print(f"[red]failed[/] {escape(reason if str(path) in reason else f'{path}: {reason}')}")
    if result.failed:
        raise typer.Exit(1)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML with arms, seeds and steps.")],
    out: Annotated[Path, typer.Option(help="Folder of the study; finished runs in it are kept.")],
    root: Annotated[Optional[Path], typer.Option(help="Folder of the data.")] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, sharing the cores.")] = 1,
) -> None:
    """Train and score many settings over several seeds; write one table and one picture."""
    from flowseg.study import load_study, run_study

    table = run_study(load_study(file), out, root=root, jobs=jobs, console=Console(stderr=True))
    typer.echo(table.read_text())


def _absolute(path: Path | None) -> str | None:
    # The run folder keeps the settings; a relative root would only hold from one working directory.
    return None if path is None else str(path.resolve())


def _bar(title: str, total: int | None, shown: bool = True):
    """A progress bar as a context manager that gives ``advance(count)``."""
    import contextlib

    from rich.progress import Progress

    @contextlib.contextmanager
    def bar():
        with Progress(console=Console(stderr=True), disable=not shown) as progress:
            task = progress.add_task(title, total=total)
            yield lambda count: progress.advance(task, count)

    return bar()
