"""Training: one plain loop on accelerate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from flowseg.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint, save_weights
from flowseg.codes import build_codebook
from flowseg.config import Config, OptimConfig, save_config
from flowseg.data import open_data, training_batches
from flowseg.errors import UserError
from flowseg.evaluate import Scores, evaluate
from flowseg.flow import make_source, sample_times
from flowseg.memory import keep_freed_memory
from flowseg.model import build_model
from flowseg.segment import Segmenter, autocast, default_device, resolve_precision
from flowseg_kernels import Codebook, flow_interpolate, flow_loss


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
    """Rate of step ``step`` (from 0): linear warm-up, then cosine in ``progress`` (0..1) down to ``lr * lr_end``."""
    rate = optim.lr
    if optim.schedule == "cosine":
        rate *= optim.lr_end + (1 - optim.lr_end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return rate * min(1.0, (step + 1) / optim.warmup) if optim.warmup else rate


def flow_step(
    model: nn.Module,
    codebook: Codebook,
    config: Config,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch.

    Args:
        model: ``(x_t, t, image) -> prediction``.
        codebook: codes on the device of ``images``.
        config: flow, loss and code settings.
        images: ``(B, 3, H, W)`` in [-1, 1].
        labels: ``(B, H, W)``, 255 is ignored.
        generator: CPU generator of times and noise.

    Returns:
        The scalar loss, and what :func:`squared_error` needs to judge the same prediction.
    """
    flow, loss = config.flow, config.loss
    t = sample_times(
        images.shape[0],
        sampler=flow.time_sampler,
        mean=flow.time_mean,
        std=flow.time_std,
        shift=flow.time_shift,
        zero_fraction=flow.zero_fraction,
        generator=generator,
    ).to(images.device)
    source = make_source(images, config.codes.channels, flow.source, generator)
    x_t = flow_interpolate(source, labels, t, codebook)
    # The correction weighs distances to codes, so the loss is taken in float32 whatever autocast gave.
    prediction = model(x_t, t, images if config.model.condition_on_image else None).float()
    value = flow_loss(
        prediction,
        source,
        labels,
        t,
        codebook,
        predicts=flow.predicts,
        loss_space=loss.space,
        correction_weight=loss.correction_weight,
        schedule=loss.schedule,
        temperature=loss.temperature,
        eps=loss.eps,
        transform=loss.transform,
        max_norm=loss.max_norm,
    )
    return value, {"prediction": prediction.detach(), "source": source, "labels": labels, "t": t}


@torch.no_grad()
def squared_error(parts: dict[str, Tensor], codebook: Codebook, config: Config) -> float:
    """Plain squared error of a prediction: unlike the loss, it can be compared between correction settings."""
    return float(
        flow_loss(
            parts["prediction"],
            parts["source"],
            parts["labels"],
            parts["t"],
            codebook,
            predicts=config.flow.predicts,
            loss_space=config.loss.space,
            correction_weight=0.0,
        )
    )


class Ema:
    """Moving average of the parameters, float32; decay after ``n`` updates is ``min(limit, (1 + n) / (10 + n))``."""

    def __init__(self, model: nn.Module, limit: float):
        self.limit = limit
        self.tensors = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move towards ``model``; ``updates`` is how many came before."""
        decay = min(self.limit, (1 + updates) / (10 + updates))
        current = [value.detach().float() for value in model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), current, 1 - decay)


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
    averaged weights with the highest validation mIoU. SIGTERM and SIGINT end the run after the current step, with a
    checkpoint.

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
    # Autocast is ours: accelerate keeps the first precision for the life of the process, and a demo may want two.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    out = Path(out)
    _check_out(out, resume)
    data = open_data(config.data, seed=config.train.seed)
    codebook = build_codebook(config.codes, data.num_classes).to(accelerator.device)
    bare_model = build_model(config)
    _check_sizes(config, bare_model.size.patch_size)
    bare_model.to(accelerator.device)
    ema = Ema(bare_model, config.optim.ema_decay)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        bare_model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=0.0, fused=True
    )
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    state = TrainState()
    if resume:
        found = list_checkpoints(out)
        if not found:
            raise UserError(f"--resume: no checkpoint in {out / 'checkpoints'}; leave --resume out to start anew")
        state = load_checkpoint(found[-1], bare_model, ema.tensors, optimizer.optimizer)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        save_config(config, out / "config.yaml")
        if resume:
            _truncate_metrics(out / "metrics.jsonl", state.step)

    ema_model = copy.deepcopy(bare_model).requires_grad_(False)
    segmenter = Segmenter(ema_model, codebook, config, accelerator.device)
    accumulation = config.train.accumulation
    batches = training_batches(
        data.train,
        config.data,
        config.train.batch_size,
        seed=config.train.seed,
        first_batch=state.step * accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    result = TrainResult(state, None, "steps", [])
    started = time.monotonic() - state.seconds
    window_start, window_images = time.monotonic(), 0
    limit = config.train.max_minutes * 60 if config.train.max_minutes else math.inf

    def validate() -> None:
        nonlocal window_start
        begin = time.monotonic()
        if accelerator.is_main_process:
            weights = ema.tensors if config.sample.weights == "ema" else dict(bare_model.named_parameters())
            _copy_into(ema_model, weights)
            scores = evaluate(segmenter, data.val, limit=config.train.eval_images)
            result.scores = scores
            result.curve.append((state.step, scores.miou))
            log(event="validation", step=state.step, miou=scores.miou, pixel_accuracy=scores.pixel_accuracy)
            if scores.miou > state.best_miou:
                state.best_miou = scores.miou
                save_weights(out / "best.safetensors", bare_model, weights, step=state.step, miou=scores.miou)
            if on_validation:
                on_validation(state.step, scores)
        window_start += time.monotonic() - begin

    def check_finite(*values: Tensor) -> None:
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise UserError(
                f"the loss is no longer finite at step {state.step}; lower optim.lr or raise loss.eps, then "
                f"--resume from the last checkpoint"
            )

    def save() -> None:
        # The newest checkpoint is what a run goes on from: it must not hold weights that are not numbers.
        check_finite(*bare_model.parameters())
        if accelerator.is_main_process:
            state.seconds = time.monotonic() - started
            save_checkpoint(out, bare_model, ema.tensors, optimizer.optimizer, state, config.train.keep)

    def next_batch() -> tuple[Tensor, Tensor]:
        try:
            return next(batches)
        except UserError:
            # Bad data is no reason to lose the steps since the last checkpoint. Alone: peers would wait for each other.
            if state.step and accelerator.num_processes == 1:
                save()
            raise

    with (
        _metrics_log(out / "metrics.jsonl", accelerator.is_main_process) as log,
        _stop_on_signal() as stop,
        _progress(console if accelerator.is_main_process else None, title, config, state) as show,
    ):
        model.train()
        while state.step < config.train.steps:
            elapsed = time.monotonic() - started
            if elapsed >= limit:
                result.stopped_by = "time"
                break
            progress = max(state.step / config.train.steps, elapsed / limit)
            rate = learning_rate(optim, state.step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for micro in range(accumulation):
                images, labels = (part.to(accelerator.device, non_blocking=True) for part in next_batch())
                generator = _generator(config, state.step, micro, accelerator.process_index)
                last = micro == accumulation - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    with autocast(config.train.mixed_precision, accelerator.device):
                        value, parts = flow_step(model, codebook, config, images, labels, generator)
                    accelerator.backward(value / accumulation)
                total = total + value.detach() / accumulation
                window_images += images.shape[0] * accelerator.num_processes
            norm = accelerator.clip_grad_norm_(model.parameters(), optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(bare_model, state.step)
            state.step += 1
            at_end = state.step == config.train.steps
            if state.step % config.train.log_every == 0 or at_end:
                check_finite(total, norm)
                loss = float(total)
                speed = window_images / max(time.monotonic() - window_start, 1e-9)
                window_start, window_images = time.monotonic(), 0
                log(
                    event="train",
                    step=state.step,
                    loss=loss,
                    squared_error=squared_error(parts, codebook, config),
                    grad_norm=float(norm),
                    lr=rate,
                    images_per_second=speed,
                    seconds=time.monotonic() - started,
                )
                show(loss=loss, speed=speed, fraction=progress, miou=result.scores and result.scores.miou)
            if state.step % config.train.eval_every == 0 and not at_end:
                validate()
            if stop:
                result.stopped_by = stop[0]
                break
            if state.step % config.train.checkpoint_every == 0 and not at_end:
                save()
        if not stop:
            validate()
            show(fraction=1.0, miou=result.scores and result.scores.miou)
        save()
    accelerator.wait_for_everyone()
    return result


def _generator(config: Config, step: int, micro: int, rank: int) -> torch.Generator:
    """Times and noise of one batch as a function of its place in the run alone."""
    # SeedSequence mixes the numbers, so that neighbouring steps do not get related streams.
    words = np.random.SeedSequence((config.train.seed, 2, step, micro, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def _check_out(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if not resume and list_checkpoints(out):
        raise UserError(f"--out {out}: holds a run already; add --resume to go on with it, or give another folder")


def _check_sizes(config: Config, patch: int) -> None:
    for name in ("height", "width"):
        value = getattr(config.data, name)
        if value % patch:
            near = max(patch, round(value / patch) * patch)
            raise UserError(f"data.{name} must be a multiple of the patch size {patch}, got {value}; try {near}")


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps are done again."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)


def _step_of(line: str) -> float:
    """Step of a metrics line; infinite for one that a killed process left unfinished."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextlib.contextmanager
def _metrics_log(path: Path, active: bool) -> Iterator[Callable[..., None]]:
    if not active:
        yield lambda **_: None
        return
    with path.open("a") as file:

        def log(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

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


@contextlib.contextmanager
def _progress(console: Console | None, title: str, config: Config, state: TrainState) -> Iterator[Callable[..., None]]:
    if console is None:
        yield lambda **_: None
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = config.train.steps
        task = progress.add_task(title, total=total, completed=state.step, facts="")
        facts: dict[str, str] = {}

        def show(
            loss: float | None = None, speed: float | None = None, fraction: float = 0.0, miou: float | None = None
        ) -> None:
            if loss is not None:
                facts["loss"] = f"loss {loss:.4f}"
            if speed is not None:
                facts["speed"] = f"{speed:.1f} img/s"
            if miou is not None:
                facts["miou"] = f"mIoU {miou:.1f}"
            # A time limit may end the run before the steps do; the bar then shows where the steps will have got to.
            likely = round(state.step / fraction) if 0 < fraction < 1 else state.step if fraction else total
            progress.update(
                task, completed=state.step, total=max(state.step, min(total, likely)), facts="  ".join(facts.values())
            )

        yield show
