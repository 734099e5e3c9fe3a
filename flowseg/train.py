"""Training: one plain loop on accelerate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import fcntl
import importlib.util
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowseg.align import ImageFeatures
from flowseg.checkpoint import (
    TrainState,
    check_meaning,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from flowseg.codes import IGNORE_INDEX, build_codebook
from flowseg.config import Config, OptimConfig, load_config, save_config
from flowseg.data import SegmentationData, open_data, resolve_labels, training_batches
from flowseg.data.label_table import tell_labels
from flowseg.errors import UserError
from flowseg.evaluate import Scores, evaluate
from flowseg.memory import keep_freed_memory
from flowseg.model import FlowSegModel, build_model, load_pixnerd
from flowseg.model.sizes import check_sizes
from flowseg.objective import flow_step, squared_error
from flowseg.parallel import Peers, shard, whole
from flowseg.progress import training_bar
from flowseg.segment import Segmenter, autocast, default_device, resolve_precision


@dataclasses.dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        state: step, time and best mIoU.
        scores: of the last validation, if any.
        stopped_by: ``"steps"``, ``"time"``, or the number of the signal.
        curve: ``(step, mIoU)`` of every validation in this call.
    """

    state: TrainState
    scores: Scores | None
    stopped_by: str | int
    curve: list[tuple[int, float]]


def learning_rate(optim: OptimConfig, step: int, progress: float) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, then cosine or linear in ``progress`` (0..1) down to ``lr * lr_end``."""
    rate = optim.lr
    progress = min(progress, 1.0)
    if optim.schedule != "constant":
        left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        rate *= optim.lr_end + (1 - optim.lr_end) * left
    return rate * min(1.0, (step + 1) / optim.warmup) if optim.warmup else rate


class Ema:
    """Moving average of the parameters, float32; decay after ``n`` updates is ``min(limit, (1 + n) / (10 + n))``.

    Of sharded parameters each process averages its own part.
    """

    def __init__(self, model: nn.Module, limit: float):
        self.limit = limit
        self.tensors = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move towards ``model``; ``updates`` is how many came before."""
        decay = min(self.limit, (1 + updates) / (10 + updates))
        current = [_own_part(value.detach()).float() for value in model.parameters()]
        torch._foreach_lerp_([_own_part(value) for value in self.tensors.values()], current, 1 - decay)


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    title: str = "train",
    on_validation: Callable[[int, Scores], None] | None = None,
) -> TrainResult:
    """Train until ``train.steps`` or ``train.max_minutes``, whichever comes first.

    Writes to ``out``: ``config.yaml`` (resolved), ``metrics.jsonl``, ``checkpoints/``, and ``best.safetensors``, the
    weights with the highest validation mIoU (averaged ones unless ``sample.weights`` says otherwise). SIGTERM and SIGINT end
    the run after the current step, with a checkpoint.

    The loss of a step is the mean over all labelled pixels of all its examples, so that it does not matter how they are
    spread over accumulated batches and processes.

    Args:
        config: all settings.
        out: run folder; must hold no run yet unless ``resume``.
        resume: go on from its newest checkpoint. On a CPU in float32 the result is bit for bit that of a run that was
            never interrupted, as long as no time limit bends the learning rate.
        console: where to draw; ``None`` draws nothing.
        title: name on the progress bar.
        on_validation: called with step and scores.

    Raises:
        UserError: data or settings that cannot work, an occupied ``out``, or a loss that is no longer finite.
    """
    if not torch.accelerator.is_available():
        keep_freed_memory()
    config = config.model_copy(deep=True)
    config.train.mixed_precision = resolve_precision(config.train.mixed_precision, default_device())
    out = Path(out)
    _check_trackers(config)
    # Autocast is ours: accelerate keeps the first precision for the life of the process, and a demo may want two.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.accelerator.is_available(),
        log_with=config.train.trackers or None,
        project_dir=out,
    )
    _check_out(out, resume)
    with _occupied(out) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(config, out, accelerator, resume, console, title, on_validation)


def _train(
    config: Config,
    out: Path,
    accelerator: Accelerator,
    resume: bool,
    console: Console | None,
    title: str,
    on_validation: Callable[[int, Scores], None] | None,
) -> TrainResult:
    main, device = accelerator.is_main_process, accelerator.device
    peers = Peers(accelerator.num_processes)
    if resume:
        _check_codes(config, out)
    data = open_data(config.data, seed=config.train.seed, check=main)
    if main and config.data.check != "none":
        tell_labels(data, config.data.name, console)
    codebook = build_codebook(config.codes, data.num_classes).to(device)
    encoder = ImageFeatures.from_pretrained(config.repa.encoder).to(device) if config.repa.weight else None
    bare_model = build_model(config, align_dim=encoder.dim if encoder else None)
    _check_model(config, bare_model)
    if config.model.pixnerd and not resume:
        report = load_pixnerd(bare_model, config.model.pixnerd)
        if console:
            console.print(f"{config.model.pixnerd}: {report}", highlight=False)
    bare_model.to(device)
    ema_model = copy.deepcopy(bare_model).requires_grad_(False)
    ema_model.projector = None
    sharded = config.train.strategy == "fsdp" and peers.world > 1
    if sharded:
        shard(bare_model)
    ema = Ema(bare_model, config.optim.ema_decay)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        bare_model.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    # The compiled network shares its parameters with the bare one, which names them in checkpoints.
    model = torch.compile(bare_model, fullgraph=not sharded) if config.model.compile else bare_model
    if not sharded:
        model = accelerator.prepare_model(model)
    state = TrainState()
    if resume:
        found = list_checkpoints(out)
        if not found:
            raise UserError(f"--resume: no checkpoint in {out / 'checkpoints'}; leave --resume out to start anew")
        state = load_checkpoint(found[-1], bare_model, ema.tensors, optimizer)
    if main:
        save_config(config, out / "config.yaml")
        if resume:
            _truncate_metrics(out / "metrics.jsonl", state)
        else:
            # What a run that never came to a checkpoint left; it is not this run's.
            for name in ("metrics.jsonl", "best.safetensors"):
                (out / name).unlink(missing_ok=True)
    if config.train.trackers:
        accelerator.init_trackers(config.train.project, config=_flat(config.model_dump(mode="json")))

    segmenter = Segmenter(ema_model, codebook, config, device)
    accumulation = config.train.accumulation
    result = TrainResult(state, None, "steps", [])
    started = time.monotonic() - state.seconds
    window_start, window_images = time.monotonic(), 0
    limit = config.train.max_minutes * 60 if config.train.max_minutes else math.inf

    def validate() -> None:
        nonlocal window_start
        begin = time.monotonic()

        def leave_on_signal(_count: int) -> None:
            # Several processes would not leave together: they finish the validation first.
            if stop and peers.world == 1:
                raise _Interrupted

        weights = ema.tensors if config.sample.weights == "ema" else dict(bare_model.named_parameters())
        _copy_into(ema_model, weights)
        segmenter.config = config.at_step(state.step - 1)
        result.scores = scores = evaluate(
            segmenter,
            data.val,
            limit=config.train.eval_images,
            rank=accelerator.process_index,
            world=peers.world,
            add_up=peers.add_up_counts,
            on_batch=leave_on_signal,
        )
        if main and state.validated < state.step:
            result.curve.append((state.step, scores.miou))
            log(event="validation", step=state.step, miou=scores.miou, pixel_accuracy=scores.pixel_accuracy)
            if scores.miou > state.best_miou:
                save_weights(out / "best.safetensors", ema_model, step=state.step, miou=scores.miou)
            if on_validation:
                on_validation(state.step, scores)
        state.best_miou, state.validated = max(state.best_miou, scores.miou), state.step
        window_start += time.monotonic() - begin

    def check_finite(*values: Tensor) -> None:
        wrong = not all(bool(torch.isfinite(_own_part(value)).all()) for value in values)
        if peers.add_up(wrong)[0]:
            raise UserError(
                f"the loss is no longer finite at step {state.step}; lower optim.lr or raise loss.eps, then "
                f"--resume from the last checkpoint"
            )

    def save() -> None:
        # The newest checkpoint is what a run goes on from: it must not hold weights that are not numbers.
        check_finite(*bare_model.parameters())
        state.seconds = time.monotonic() - started
        if main or sharded:
            save_checkpoint(out, bare_model, ema.tensors, optimizer, state, config.train.keep, write=main)

    def next_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
        try:
            return [next(batches) for _ in range(accumulation)]
        except UserError:
            # Bad data is no reason to lose the steps since the last checkpoint. Alone: peers would wait for each other.
            if state.step and accelerator.num_processes == 1:
                save()
            raise

    with (
        _metrics_log(out / "metrics.jsonl", accelerator) as log,
        _stop_on_signal() as stop,
        training_bar(console if main else None, title, config.train.steps, lambda: state.step) as show,
    ):
        model.train()
        batches, batches_of = iter(()), None

        def due(step: int) -> bool:
            return step > 0 and step % config.train.eval_every == 0 and step < config.train.steps

        with contextlib.suppress(_Interrupted):
            if due(state.step) and state.validated < state.step:
                validate()
        while state.step < config.train.steps:
            now = config.at_step(state.step)
            if batches_of != (now.data, now.train.batch_size):
                batches = _batches(config, now, data, state.step, accelerator)
                batches_of = now.data, now.train.batch_size
            batch = next_batches()
            valid = sum(int((labels != IGNORE_INDEX).sum()) for _, labels, _ in batch)
            # Times differ between processes; the first one's decides, or learning rates would differ too.
            elapsed = time.monotonic() - started if main else 0.0
            elapsed, valid, stopping = peers.add_up(elapsed, valid, len(stop))
            if stopping:
                result.stopped_by = stop[0] if stop else signal.SIGTERM
                break
            if elapsed >= limit:
                result.stopped_by = "time"
                break
            progress = max(state.step / config.train.steps, elapsed / limit)
            rate = learning_rate(now.optim, state.step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total, aligned = torch.zeros((), device=device), torch.zeros((), device=device)
            for micro, (images, labels, draws) in enumerate(batch):
                images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
                last = micro == accumulation - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    with autocast(config.train.mixed_precision, device):
                        step = flow_step(model, codebook, config, images, labels, draws, encoder)
                    # Processes' gradients are averaged, so each counts its share of the sum as many times as there are.
                    value = step.flow * (peers.world / max(valid, 1.0))
                    total += value.detach()
                    if encoder:
                        aligned += step.align.detach() / accumulation
                        value = value + step.align * (config.repa.weight / accumulation)
                    accelerator.backward(value)
                window_images += images.shape[0] * peers.world
            norm = whole(accelerator.clip_grad_norm_(model.parameters(), optim.grad_clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(bare_model, state.step)
            state.step += 1
            at_end = state.step == config.train.steps
            if state.step % config.train.log_every == 0 or at_end:
                check_finite(total, norm)
                error = squared_error(step, codebook, config)
                sums = peers.add_up(float(total), float(error), float(aligned))
                loss, error, align = (value / peers.world for value in sums)
                speed = window_images / max(time.monotonic() - window_start, 1e-9)
                window_start, window_images = time.monotonic(), 0
                log(
                    event="train",
                    step=state.step,
                    loss=loss,
                    squared_error=error,
                    **({"align": align} if encoder else {}),
                    grad_norm=float(norm),
                    lr=rate,
                    images_per_second=speed,
                    seconds=time.monotonic() - started,
                )
                show(loss=loss, speed=speed, fraction=progress, miou=result.scores and result.scores.miou)
            # Alone, a signal is seen at once; of several processes each waits for the others to see it.
            if stop and peers.world == 1:
                result.stopped_by = stop[0]
                break
            # Saved first: a process that is killed while it validates loses no step, and validates when it goes on.
            if state.step % config.train.checkpoint_every == 0 and not at_end:
                save()
            if due(state.step):
                with contextlib.suppress(_Interrupted):
                    validate()
        try:
            if not isinstance(result.stopped_by, int):
                validate()
                show(fraction=1.0, miou=result.scores and result.scores.miou)
        except _Interrupted:
            result.stopped_by = stop[0]
        save()
    accelerator.wait_for_everyone()
    if config.train.trackers:
        accelerator.end_training()
    return result


def _batches(config: Config, now: Config, data: SegmentationData, step: int, accelerator: Accelerator) -> Iterator:
    """Batches from ``step`` on: each stage goes on with the draws where the one before it ended."""
    ends = [stage.at for stage in config.train.stages if stage.at <= step]
    per_step = config.train.accumulation * accelerator.num_processes
    draws = sum(
        (last - first) * config.at_step(first).train.batch_size * per_step
        for first, last in itertools.pairwise([0, *ends, step])
    )
    return training_batches(
        data.train,
        now.data,
        now.train.batch_size,
        seed=config.train.seed,
        first_draw=draws,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def _own_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to numbers and texts, which is what trackers take."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    # All processes walk through all names: gathering a sharded tensor is a joint act.
    for name, tensor in tensors.items():
        value = whole(tensor)
        if name in own:
            own[name].copy_(value)


class _Interrupted(Exception):
    """A signal arrived during a validation."""


def _check_trackers(config: Config) -> None:
    for name in config.train.trackers:
        if not any(map(importlib.util.find_spec, {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,)))):
            raise UserError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


@contextlib.contextmanager
def _occupied(out: Path) -> Iterator[None]:
    """Keep other trainers out of the folder until the context ends, or the process does.

    Raises:
        UserError: one is in there.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems cannot lock a folder; that is no reason not to train.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise UserError(f"--out {out}: another process trains there; wait for it, or give another folder") from None
    # A data loader's worker outlives a killed trainer by seconds, and would keep others out for as long.
    holder = {handle}
    register_after_fork(holder, lambda handles: os.close(*handles))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(holder.pop())
        # Of a run that failed before it wrote anything nothing stays.
        with contextlib.suppress(OSError):
            out.rmdir()


def _check_out(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if not resume and list_checkpoints(out):
        raise UserError(f"--out {out}: holds a run already; add --resume to go on with it, or give another folder")


def _check_codes(config: Config, out: Path) -> None:
    """A code means a class: with other codes or classes what a run has learnt would be taken for something else."""
    if not (out / "config.yaml").is_file():
        return
    before = load_config(out / "config.yaml")
    old, new = (resolve_labels(settings.data).classes for settings in (before, config))
    if old != new:
        raise UserError(
            f"--resume: {out} learnt {len(old)} classes, {_listed(old)}; data.classes has {len(new)}, {_listed(new)}; "
            "give a new --out"
        )
    check_meaning(before, config, out)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


def _check_model(config: Config, model: FlowSegModel) -> None:
    check_sizes(config, model.size.patch_size)
    if config.repa.weight and config.repa.block > model.size.depth:
        raise UserError(
            f"repa.block must be at most the {model.size.depth} blocks of the model, got {config.repa.block}"
        )


def _truncate_metrics(path: Path, state: TrainState) -> None:
    """Drop what was logged after the checkpoint: those steps and validations are done again."""
    if path.is_file():
        until = {"validation": state.validated}
        lines = ((line, *_step_of(line)) for line in path.read_text().splitlines())
        kept = [line for line, event, step in lines if step <= until.get(event, state.step)]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)


def _step_of(line: str) -> tuple[str, float]:
    """Event and step of a metrics line; an infinite step for one that a killed process left unfinished."""
    try:
        fields = json.loads(line)
        return fields["event"], fields["step"]
    except (ValueError, KeyError, TypeError):
        return "", math.inf


@contextlib.contextmanager
def _metrics_log(path: Path, accelerator: Accelerator) -> Iterator[Callable[..., None]]:
    """Write metrics as a line of JSON, and to the trackers; only the first process does."""
    if not accelerator.is_main_process:
        yield lambda **_: None
        return
    with path.open("a") as file:

        def log(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()
            event, step = fields.pop("event"), fields.pop("step")
            if accelerator.trackers:
                accelerator.log({f"{event}/{name}": value for name, value in fields.items()}, step=step)

        yield log


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT; a second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _frame: object) -> None:
        received.append(number)
        for other, handler in previous.items():
            signal.signal(other, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
