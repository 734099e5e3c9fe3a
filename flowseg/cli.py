"""The command line ``flowseg``."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from flowseg import __version__
from flowseg.data_names import DATA_NAMES
from flowseg.errors import CompilerWarning, DataWarning, PeerError, UserError
from flowseg.runs.files import write_whole
from flowseg.runs.terminal import make_console, printable, say, speak_any_text

# Each command imports the modules that it needs: importing PyTorch here would delay --help.
app = typer.Typer(
    help="Generative segmentation by flow matching. Start with: flowseg demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _sets(example: str) -> typer.models.OptionInfo:
    return typer.Option("--set", metavar="KEY=VALUE", help=f"Any setting, such as {example}; can be repeated.")


TrainSets = Annotated[list[str], _sets("optim.lr=3e-4")]
WorkSets = Annotated[list[str], _sets("model.size=L")]
SampleSets = Annotated[list[str], _sets("sample.steps=5")]
Checkpoint = Annotated[
    str, typer.Option(help="Weights: latest, best, a step, a .safetensors file or a checkpoint's folder.")
]
Root = Annotated[Path | None, typer.Option(help="Folder of the data set.")]
MovedRoot = Annotated[Path | None, typer.Option(help="Folder of the data, if it has moved since training.")]


DataName = Enum("DataName", {name: name for name in DATA_NAMES}, type=str)


class Resume(str, Enum):
    """How ``--resume`` continues a run: ``always`` needs a checkpoint, ``auto`` starts a new run if there is none."""

    always = "always"
    auto = "auto"


class _BareResume(TyperCommand):
    """A command that accepts ``--resume`` without a value, as ``--resume=always``."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Add the value to a bare ``--resume``."""
        words, values = [], {choice.value for choice in Resume}
        for place, word in enumerate(args):
            following = args[place + 1] if place + 1 < len(args) else ""
            words.append("--resume=always" if word == "--resume" and following not in values else word)
        return super().parse_args(ctx, words)


class Split(str, Enum):
    """Splits to evaluate."""

    train = "train"
    val = "val"


def main() -> None:
    """Run the command line; an error of the user prints one line to stderr and exits with status 2."""
    speak_any_text()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DataWarning)
            show = warnings.showwarning
            warnings.showwarning = lambda *warning, **more: _show_warning(show, *warning, **more)
            app()
    except PeerError:
        # The process that failed has printed the error.
        sys.exit(2)
    except UserError as error:
        _leave(str(error))
    except OSError as error:
        # Any write can fail because of a full disk or missing rights. Other OSErrors are bugs: show their traceback.
        if error.errno not in _NOT_WRITABLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _leave(
            f"{place}cannot be written ({error.strerror}); free disk space or give another folder; `flowseg train` then "
            "continues with --resume"
        )


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_NOT_WRITABLE += (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


DEMO_FILES = """  open it in a browser: scores, the flow step by step, the speed of the kernels on this machine
other files in the same folder:
  scene.png    one validation scene: image and truth, the four steps of the flow, the decoded masks
  curves.png   accuracy during training, plain flow matching and FlowSeg
  report.json  all numbers
  vanilla/ and flowseg/ are run folders for flowseg report, flowseg predict --run and flowseg evaluate --run"""


def _leave(message: str) -> NoReturn:
    make_console().print(Text.assemble(("error:", "bold red"), " ", printable(message)), soft_wrap=True)
    sys.exit(2)


def _tell(text: str) -> None:
    """Print a result to standard output."""
    say(make_console(stderr=False), text)


def _show_warning(show: Callable, message: Warning | str, category: type[Warning], *place, **more) -> None:
    """Print a warning about data as one line; other warnings are shown as Python does."""
    if issubclass(category, (DataWarning, CompilerWarning)):
        make_console().print(Text.assemble(("warning:", "yellow"), " ", printable(str(message))), soft_wrap=True)
    else:
        show(message, category, *place, **more)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"flowseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo_out"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Take seconds instead of minutes: shows the report, but its scores mean nothing."),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=4, help="Training steps of each of the two models; default: as many as fit into 105 s."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of weights, data and times.")] = 0,
) -> None:
    """Train plain flow matching and FlowSeg on generated images (5 minutes on 2 cores) and write an HTML report. No download."""
    from flowseg.experiments.demo import run_demo

    report = run_demo(out, quick=quick, steps=steps, seed=seed, console=make_console())
    _tell(f"report: {report.resolve()}\n{DEMO_FILES}")


@app.command(cls=_BareResume)
def train(
    out: Annotated[Path, typer.Option(help="Run folder to write: a new folder, or with --resume the folder of a run.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with settings, such as configs/camvid.yaml.")] = None,
    data: Annotated[
        DataName | None,
        typer.Option(help="Data set. All but digits and paints need --root. Default: digits, or as in --config."),
    ] = None,
    root: Root = None,
    model: Annotated[str | None, typer.Option(help="Size of the network: nano (for a CPU), S, B, L or XL.")] = None,
    steps: Annotated[int | None, typer.Option(help="Total number of optimiser steps.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this many minutes; the learning rate decays to its end by then.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step and process.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of weights, order, crops and times.")] = None,
    resume: Annotated[
        Resume | None,
        typer.Option(
            metavar="[=auto]",
            help="Continue from the newest checkpoint in --out; without --config the run keeps its settings. "
            "--resume=auto starts a new run if there is no checkpoint, for jobs that a scheduler restarts.",
        ),
    ] = None,
    sets: TrainSets = [],  # noqa: B006
) -> None:
    """Train a model. A --set overrides a flag, and a flag overrides --config."""
    from flowseg.config import load_config
    from flowseg.training.trainer import train as run_training

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
    # The launcher sets RANK; only the first of several processes prints.
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    say(console, f"flowseg {__version__}  {settings.data.name}  {settings.model.size}  -> {out}")
    if settings.train.steps < 2 * settings.optim.warmup:
        say(
            console,
            f"note: {settings.train.steps} steps are few for a warm-up of {settings.optim.warmup} steps; "
            "shorten the warm-up with --set optim.warmup=N",
        )
    go_on = "auto" if resume is Resume.auto else resume is not None
    result = run_training(settings, out, resume=go_on, console=console)
    if isinstance(result.stopped_by, int):
        command = f"flowseg train --out {shlex.quote(str(out))} --resume"
        say(console, f"stopped by signal at step {result.state.step}; continue with: {command}")
        raise typer.Exit(128 + result.stopped_by)
    scores = result.scores
    say(
        console,
        f"step {result.state.step} (ended by {result.stopped_by}): mIoU {scores.miou:.2f} %, pixel accuracy "
        f"{scores.pixel_accuracy:.2f} % on {scores.images} images; best mIoU {result.state.best_miou:.2f} %",
    )


@app.command()
def flops(
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings, such as configs/ade20k_l16.yaml.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of processes that will train; train.batch_size is per process.")
    ] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Model TFLOP/s of a GPU, as model_tflops_per_second in the log of a short run; adds the hours of the run: "
            "its model FLOPs, without REPA and recomputation, divided by this rate."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Total number of optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step and process.")] = None,
    sets: WorkSets = [],  # noqa: B006
) -> None:
    """Count the work of a training run before it starts: FLOPs per image and in all, and the hours. Needs no GPU and no data."""
    from flowseg.config import load_config
    from flowseg.training.work import amount, duration, work_of

    if tflops is not None and not 1e-6 <= tflops <= 1e6:
        raise UserError(f"--tflops must be from 1e-6 to 1e6, got {tflops:g}")
    settings = load_config(config, sets, {"train.steps": steps, "train.batch_size": batch_size})
    stages = work_of(settings, processes)
    title = f"{settings.model.size} on {settings.data.name}, {processes} process{'es' * (processes > 1)}"
    table = Table("steps", *(f"{stage.first} to {stage.last}" for stage in stages), title=printable(title))
    rows = {
        "size of the images": lambda stage: f"{stage.height} x {stage.width}",
        "images": lambda stage: f"{stage.images:,}",
        "forward, per image": lambda stage: amount(stage.flops.forward),
        "backward": lambda stage: amount(stage.flops.backward),
        "recomputed in the backward": lambda stage: amount(stage.flops.recomputed),
        "REPA": lambda stage: "not counted" if stage.alignment is None else amount(stage.alignment),
        "training step, per image": lambda stage: amount(stage.per_image),
        "all images": lambda stage: amount(stage.total),
        "model FLOPs of all images": lambda stage: amount(stage.model_flops),
    }
    total, model_flops = sum(stage.total for stage in stages), sum(stage.model_flops for stage in stages)
    if tflops:
        rows["time of one GPU"] = lambda stage: duration(stage.model_flops / (tflops * 1e12))
    if total == model_flops:
        del rows["model FLOPs of all images"]
    if not any(stage.flops.recomputed for stage in stages):
        del rows["recomputed in the backward"]
    if not settings.repa.weight:
        del rows["REPA"]
    for name, cell in rows.items():
        table.add_row(name, *map(cell, stages))
    make_console(stderr=False).print(table)
    text = f"in all {amount(total)}"
    if total != model_flops:
        text += f", {amount(model_flops)} of them model FLOPs"
    if tflops:
        seconds = model_flops / (tflops * 1e12)
        text += f": {duration(seconds)} of one GPU at {tflops:g} model TFLOP/s"
        if processes > 1:
            text += f", {duration(seconds / processes)} on {processes} GPUs if they scale perfectly"
    if any(stage.alignment is None for stage in stages):
        text += f"; repa.encoder {settings.repa.encoder!r} is not counted: it is neither a public DINOv2 nor a folder"
    _tell(text)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Option(help="Run folder, as written by train.")],
    checkpoint: Checkpoint = "latest",
    root: MovedRoot = None,
    split: Annotated[Split, typer.Option(help="Split to score.")] = Split.val,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only this many images, evenly spread.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the ODE solver; default: as in the run.")] = None,
    method: Annotated[
        str | None, typer.Option(help="ODE solver: euler, heun or midpoint; default: as in the run.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this JSON file.")] = None,
    sets: SampleSets = [],  # noqa: B006
) -> None:
    """Score a run: IoU of each class, mIoU, pixel accuracy. Under `accelerate launch` the processes divide the images."""
    import torch
    from accelerate import PartialState

    from flowseg.checkpoint import find_weights, read_run_config, weights_name
    from flowseg.data import open_data
    from flowseg.inference.evaluate import chosen_indices
    from flowseg.inference.evaluate import evaluate as score
    from flowseg.runs.memory import keep_freed_memory
    from flowseg.runs.parallel import Ranks
    from flowseg.runs.progress import counting_view
    from flowseg.segment import Segmenter

    if json_file:
        _check_output_file("--json", json_file)
    state = PartialState(cpu=not torch.accelerator.is_available())
    settings = read_run_config(
        run,
        sets,
        {"data.root": _absolute(root), "sample.steps": steps, "sample.method": method},
        checkpoint=checkpoint,
    )
    ranks = Ranks(state.num_processes, state.process_index)
    with ranks.together():
        data = open_data(settings.data, (split.value,), seed=settings.train.seed)
    pairs = data.train if split is Split.train else data.val
    if not torch.accelerator.is_available():
        keep_freed_memory()
    # A run that still trains may write another checkpoint meanwhile.
    weights = find_weights(run, checkpoint, settings.sample.weights)
    segmenter = Segmenter.from_run(run, settings, str(weights), compiled=settings.model.compile)
    shown = counting_view(
        make_console(quiet=not state.is_main_process), "evaluate", len(chosen_indices(len(pairs), limit))
    )
    with shown as advance, ranks.adding_up() as add_up:
        scores = score(
            segmenter,
            pairs,
            limit=limit,
            on_batch=lambda count: advance(count * state.num_processes),
            rank=state.process_index,
            world=state.num_processes,
            add_up=add_up,
        )
    if not state.is_main_process:
        return
    unwritten = None
    if json_file:
        facts = scores.summary(data.labels.classes)
        facts |= {"split": split.value, "checkpoint": checkpoint, "weights": weights_name(run, weights)}
        facts |= {"sample": settings.sample.model_dump()}
        try:
            write_whole(json_file, json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            # The scores are shown before the command fails.
            unwritten = error.strerror or str(error)
    table = Table("class", "IoU %")
    names, groups = data.labels.classes, {"": range(len(scores.iou))}
    if len(names) > 255:
        # All classes are in the JSON file and in the report.
        groups = scores.notable(10)
    for title, classes in groups.items():
        if title:
            table.add_row(f"[italic]{title} of {len(names)}[/]", "")
        for k in classes:
            table.add_row(printable(names[k]), "absent" if scores.iou[k] is None else f"{scores.iou[k]:.2f}")
        table.add_section()
    table.add_row("mIoU", f"{scores.miou:.2f}")
    table.add_row("pixel accuracy", f"{scores.pixel_accuracy:.2f}")
    output = make_console(stderr=False)
    heading = f"{run} on {split.value} ({scores.images} images), weights {weights_name(run, weights)}"
    output.print(printable(heading), soft_wrap=True)
    output.print(table)
    if unwritten:
        raise UserError(f"--json {json_file}: cannot be written ({unwritten}); the scores are in the table above")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, as written by train.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run folder.")] = None,
    checkpoint: Checkpoint = "latest",
    root: MovedRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only this many images, evenly spread.")] = None,
    speed: Annotated[bool, typer.Option(help="Also time the kernels.")] = True,
    sets: SampleSets = [],  # noqa: B006
) -> None:
    """Score a run and write an HTML report: convergence, classes, confusion, examples, settings, speed of the kernels."""
    from flowseg.checkpoint import read_run_config
    from flowseg.report.run import write_report
    from flowseg.runs.progress import counting_view
    from flowseg.segment import Segmenter

    settings = read_run_config(run, sets, {"data.root": _absolute(root)}, checkpoint=checkpoint)
    target = out or run / "report.html"
    _check_output_file("--out", target)
    segmenter = Segmenter.from_run(run, settings, checkpoint)
    with counting_view(make_console(), "report", limit) as advance:
        scores = write_report(run, segmenter, target, limit=limit, kernel_size=256 if speed else None, on_batch=advance)
    _tell(f"report: {target.resolve()}  (mIoU {scores.miou:.2f} % on {scores.images} images)")


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Run folder, as written by train.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    checkpoint: Checkpoint = "latest",
    scores: Annotated[Path | None, typer.Option(help="Scores for the model card: a file of evaluate --json.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, for the model card.")] = None,
    sets: SampleSets = [],  # noqa: B006
) -> None:
    """Write weights, settings and a model card to a folder that can be shared; predict accepts it as --run."""
    from flowseg.checkpoint import read_run_config
    from flowseg.hub import save_pretrained
    from flowseg.segment import Segmenter

    _check_folder(out)
    try:
        measured = json.loads(scores.read_text(encoding="utf-8")) if scores else None
    except (OSError, ValueError) as error:
        raise UserError(f"--scores {scores}: cannot be read as JSON ({error})") from None
    if scores and not (isinstance(measured, dict) and {"miou", "pixel_accuracy", "images"} <= measured.keys()):
        raise UserError(f"--scores {scores}: not a file that 'flowseg evaluate --json' writes")
    segmenter = Segmenter.from_run(run, read_run_config(run, sets, checkpoint=checkpoint), checkpoint, "cpu")
    _tell(f"written: {save_pretrained(segmenter, out, scores=measured, license=license)}")


@app.command()
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Image files, folders (with sub-folders), or quoted patterns such as 'photos/*.jpg'."),
    ],
    run: Annotated[
        str, typer.Option(help="Run folder, folder of flowseg export, or OWNER/NAME on the Hugging Face hub.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    checkpoint: Checkpoint = "latest",
    overlay: Annotated[bool, typer.Option(help="Write NAME.overlay.png: the mask over the image.")] = True,
    margin: Annotated[bool, typer.Option(help="Write NAME.margin.png: certainty per pixel (dark: unsure).")] = False,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Opacity of the mask in overlays.")] = 0.5,
    steps: Annotated[int | None, typer.Option(help="Steps of the ODE solver; default: as in the run.")] = None,
    sets: SampleSets = [],  # noqa: B006
) -> None:
    """Segment images. NAME.mask.png contains class indices, shown in the colours of the classes, at the size of the image."""
    from flowseg.checkpoint import read_run_config
    from flowseg.data.datasets import resolve_labels
    from flowseg.hub import from_pretrained, is_shared
    from flowseg.inference.predict import find_inputs
    from flowseg.inference.predict import predict as segment_files
    from flowseg.runs.progress import counting_view
    from flowseg.segment import Segmenter

    _check_folder(out)
    shared = not (Path(run) / "config.yaml").is_file() and is_shared(run)
    if shared and checkpoint != "latest":
        raise UserError(f"--checkpoint {checkpoint}: {run} contains only one set of weights; leave --checkpoint out")
    settings = None if shared else read_run_config(Path(run), sets, {"sample.steps": steps}, checkpoint=checkpoint)
    images = find_inputs(inputs)
    if shared:
        segmenter = from_pretrained(run, sets + ([] if steps is None else [f"sample.steps={steps}"]))
    else:
        segmenter = Segmenter.from_run(Path(run), settings, checkpoint)
    outputs = ["mask"] + ["overlay"] * overlay + ["margin"] * margin
    with counting_view(make_console(), "predict", len(images)) as advance:
        result = segment_files(
            segmenter,
            images,
            out,
            resolve_labels(segmenter.config.data).palette,
            outputs=outputs,
            opacity=opacity,
            on_image=lambda _: advance(1),
        )
    console = make_console()
    say(console, f"{len(images) - len(result.failed)} of {len(images)} images -> {out}")
    for path, reason in result.failed:
        text = printable(reason if str(path) in reason else f"{path}: {reason}")
        console.print(Text.assemble(("failed", "red"), " ", text), soft_wrap=True)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(help="YAML file with arms, seeds and steps, such as configs/studies/camvid.yaml.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; finished runs in it are kept.")],
    root: Root = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at the same time; they share the cores.")] = 1,
) -> None:
    """Train and score several settings with several seeds; write table.md and curves.png. Repeat the command to continue."""
    from flowseg.experiments.study import load_study, run_study

    _check_folder(out)
    table = run_study(load_study(file), out, root=root, jobs=jobs, console=make_console())
    _tell(table.read_text(encoding="utf-8"))


def _check_folder(out: Path) -> None:
    """Refuse a file as output folder before the work starts."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")


def _check_output_file(option: str, file: Path) -> None:
    """Make the folder of an output file and check that it can be written, before the work starts.

    Raises:
        UserError: the file cannot be written there.
    """
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder; give a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {file}: its folder cannot be created ({error.strerror})") from None
    try:
        # Permissions do not suffice: root has all of them, and some file systems accept no files.
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(
            f"{option} {file}: {file.parent} cannot be written to ({error.strerror}); give another folder"
        ) from None


def _absolute(path: Path | None) -> str | None:
    # The run folder keeps this setting, and a relative path would only be valid in one working directory.
    return None if path is None else str(path.resolve())
