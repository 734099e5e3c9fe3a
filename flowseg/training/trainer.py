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
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowseg.checkpoint import (
    TrainState,
    check_meaning,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_state,
    save_weights,
)
from flowseg.codes import IGNORE_INDEX, build_codebook
from flowseg.config import Config, OptimConfig, load_config, save_config
from flowseg.data import open_data, resolve_labels, training_batches
from flowseg.data.label_table import tell_labels
from flowseg.errors import PeerError, UserError
from flowseg.inference.evaluate import Scores, chosen_indices, evaluate
from flowseg.model import FlowSegModel, build_model, load_pixnerd
from flowseg.model.sizes import check_sizes
from flowseg.runs.memory import is_out_of_memory, keep_freed_memory
from flowseg.runs.metrics import log_to_trackers, open_metrics, read_metrics, truncate_metrics
from flowseg.runs.parallel import Ranks, shard, whole
from flowseg.runs.progress import training_view
from flowseg.runs.signals import stop_on_signal
from flowseg.runs.terminal import printable, say
from flowseg.segment import Segmenter, autocast, default_device, resolve_precision
from flowseg.training.alignment import ImageFeatures
from flowseg.training.objective import Objective, flow_step, squared_error


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
    resume: bool | Literal["auto"] = False,
    console: Console | None = None,
    title: str = "train",
    on_validation: Callable[[int, Scores], None] | None = None,
) -> TrainResult:
    """Train until ``train.steps`` or ``train.max_minutes``, whichever comes first.

    Writes to ``out``: ``config.yaml`` (resolved), ``metrics.jsonl``, ``checkpoints/``, and ``best.safetensors``, the
    weights with the highest validation mIoU (averaged ones unless ``sample.weights`` says otherwise). SIGTERM, SIGINT,
    SIGHUP, SIGUSR1 and SIGUSR2 end the run after the current step, with a checkpoint. A checkpoint is also written before
    each validation, so that a validation that fails costs no step.

    The loss of a step is the mean over all labelled pixels of all its examples, so that it does not matter how they are
    spread over accumulated batches and processes.

    Args:
        config: all settings.
        out: run folder; must hold no run yet unless ``resume``.
        resume: go on from its newest checkpoint; ``"auto"``: only if there is one, and start anew if not. On a CPU in
            float32 the result is bit for bit that of a run that was never interrupted, as long as no time limit bends the
            learning rate. Another batch size or number of processes goes on with the next example in the order.
        console: where to draw; ``None`` draws nothing.
        title: name on the progress bar.
        on_validation: called with step and scores.

    Raises:
        UserError: data or settings that cannot work, an occupied ``out``, a loss that is no longer finite, or a
            validation that failed. Of several processes one raises it and the others raise PeerError.
    """
    if not torch.accelerator.is_available():
        keep_freed_memory()
    config = config.model_copy(deep=True)
    config.train.mixed_precision = resolve_precision(config.train.mixed_precision, default_device())
    out = Path(out)
    _check_trackers(config, out)
    # Autocast is ours: accelerate keeps the first precision for the life of the process, and a demo may want two.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.accelerator.is_available(),
        log_with=config.train.trackers or None,
        project_dir=out,
    )
    ranks = Ranks(accelerator.num_processes, accelerator.process_index)
    with contextlib.ExitStack() as stack:
        with ranks.together():
            resume = _goes_on(out, resume)
            if accelerator.is_main_process:
                stack.enter_context(_occupied(out))
            if not resume and list_checkpoints(out):
                raise UserError(
                    f"--out {out}: holds a run already; add --resume to go on with it, or give another folder"
                )
        training = _Training(
            config, out, accelerator, ranks, resume=resume, console=console, title=title, on_validation=on_validation
        )
        return training.run()


class _Training:
    """The parts of one run, and what the loop does with them."""

    def __init__(
        self,
        config: Config,
        out: Path,
        accelerator: Accelerator,
        ranks: Ranks,
        *,
        resume: bool,
        console: Console | None,
        title: str,
        on_validation: Callable[[int, Scores], None] | None,
    ):
        self.config, self.out, self.accelerator, self.ranks = config, out, accelerator, ranks
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.console, self.title, self.on_validation = console if self.main else None, title, on_validation
        with ranks.together():
            if resume:
                _check_codes(config, out)
            self.data = open_data(config.data, seed=config.train.seed, check=self.main)
            if self.main and config.data.check != "none":
                tell_labels(self.data, config.data.name, self.console)
            self._build_model(resume)
        self._build_optimizer()
        self.state = self._restore() if resume else TrainState()
        # Step of the newest checkpoint, and the newest one if it was only written because a validation followed.
        self.saved, self.passing = self.state.step if resume else -1, None
        self._open_files(resume)
        self.result = TrainResult(self.state, None, "steps", [])
        self.batches, self.batches_of = iter(()), None
        self.window_start, self.window_images = time.monotonic(), 0
        self.started = time.monotonic() - self.state.seconds
        self.limit = config.train.max_minutes * 60 if config.train.max_minutes else math.inf

    def _build_model(self, resume: bool) -> None:
        config, device = self.config, self.device
        self.codebook = build_codebook(config.codes, self.data.num_classes).to(device)
        self.encoder = ImageFeatures.from_pretrained(config.repa.encoder).to(device) if config.repa.weight else None
        self.bare_model = build_model(config, align_dim=self.encoder.dim if self.encoder else None)
        _check_model(config, self.bare_model)
        if config.model.pixnerd and not resume:
            report = load_pixnerd(self.bare_model, config.model.pixnerd)
            say(self.console, f"{config.model.pixnerd}: {report}")
        self.bare_model.to(device)
        self.ema_model = copy.deepcopy(self.bare_model).requires_grad_(False)
        self.ema_model.projector = None
        self.segmenter = Segmenter(self.ema_model, self.codebook, config, device)

    def _build_optimizer(self) -> None:
        config = self.config
        self.sharded = config.train.strategy == "fsdp" and self.ranks.world > 1
        if self.sharded:
            shard(self.bare_model)
        self.ema = Ema(self.bare_model, config.optim.ema_decay)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.bare_model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        # The compiled network shares its parameters with the bare one, which names them in checkpoints.
        compiled = config.model.compile
        model = torch.compile(self.bare_model, fullgraph=not self.sharded) if compiled else self.bare_model
        self.model = model if self.sharded else self.accelerator.prepare_model(model)

    def _restore(self) -> TrainState:
        newest = list_checkpoints(self.out)[-1]
        state = load_checkpoint(newest, self.bare_model, self.ema.tensors, self.optimizer)
        if state.draws is None:
            before = self.out / "config.yaml"
            old = load_config(before) if before.is_file() else self.config
            state.draws = _draws_before(old, state.step, self.ranks.world)
        # A process must not write its settings before the others have read the old ones.
        self.accelerator.wait_for_everyone()
        return state

    def _open_files(self, resume: bool) -> None:
        config, out, metrics = self.config, self.out, self.out / "metrics.jsonl"
        if self.main:
            save_config(config, out / "config.yaml")
            if resume:
                truncate_metrics(metrics, step=self.state.step, validated=self.state.validated)
            else:
                # A run that never came to a checkpoint left these; they are not this run's.
                for name in ("metrics.jsonl", "best.safetensors"):
                    (out / name).unlink(missing_ok=True)
        if config.train.trackers:
            # TensorBoard forgets what a killed process logged from this step on; that step itself is given to it again.
            options = {"tensorboard": {"purge_step": self.state.step}}
            tree = _flat(config.model_dump(mode="json"))
            self.accelerator.init_trackers(config.train.project, config=tree, init_kwargs=options)
            if self.main and resume and metrics.is_file():
                for line in read_metrics(metrics):
                    if line["step"] == self.state.step:
                        log_to_trackers(self.accelerator, line)

    def run(self) -> TrainResult:
        """Train until the steps, the time or a signal end it; save; validate."""
        config, state, result = self.config.train, self.state, self.result
        # Whether weights are of a step that the state does not count yet.
        self.updating = False
        with (
            open_metrics(self.out / "metrics.jsonl", self.accelerator) as self.log,
            stop_on_signal() as self.stop,
            training_view(self.console, self.title, config.steps, lambda: state.step) as self.view,
        ):
            self.model.train()
            try:
                self._train_to_the_end()
            except Exception:
                self._keep_steps()
                raise
            self.view.ended(str(result.stopped_by) if isinstance(result.stopped_by, str) else "a signal")
        self.accelerator.wait_for_everyone()
        if config.trackers:
            self.accelerator.end_training()
        return result

    def _train_to_the_end(self) -> None:
        config, state, result = self.config.train, self.state, self.result
        if self._validation_due() and state.validated < state.step:
            self._validate_unless_stopped()
        while state.step < config.steps and self._step():
            # Alone, a signal is seen at once; of several processes each waits for the others to see it.
            if self.stop and self.ranks.world == 1:
                result.stopped_by = self.stop[0]
                break
            if state.step % config.checkpoint_every == 0:
                self.save()
            if self._validation_due():
                self.save(passing=True)
                self._validate_unless_stopped()
        self.save()
        if not isinstance(result.stopped_by, int) and not self._validate_unless_stopped():
            result.stopped_by = self.stop[0]

    def _keep_steps(self) -> None:
        """Save after an error of any kind. Several processes would wait for each other, so they keep their last checkpoint."""
        if self.ranks.world > 1 or self.updating or self.state.step <= max(self.saved, 0):
            return
        with contextlib.suppress(Exception):
            self.save()
            say(self.console, self._how_to_go_on())

    def _validation_due(self) -> bool:
        """Whether a validation belongs to this step; the one at the end of the run is not meant."""
        step, config = self.state.step, self.config.train
        return step > 0 and step % config.eval_every == 0 and step < config.steps

    def _step(self) -> bool:
        """One optimiser step, or False where the run ends before it."""
        config, state, ranks = self.config, self.state, self.ranks
        now = config.at_step(state.step)
        batch, failure = self._next_batches(now)
        valid = sum(int((labels != IGNORE_INDEX).sum()) for _, labels, _ in batch)
        # Times differ between processes; the first one's decides, or learning rates would differ too.
        elapsed = time.monotonic() - self.started if self.main else 0.0
        elapsed, valid, stopping, failed = ranks.add_up(elapsed, valid, len(self.stop), failure is not None)
        if failed:
            self._leave_with(failure)
        if stopping:
            self.result.stopped_by = self.stop[0] if self.stop else signal.SIGTERM
            return False
        if elapsed >= self.limit:
            self.result.stopped_by = "time"
            return False
        progress = max(state.step / config.train.steps, elapsed / self.limit)
        rate = learning_rate(now.optim, state.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step, total, aligned = self._backward(batch, valid)
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip))
        self.updating = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.bare_model, state.step)
        state.step += 1
        state.draws += now.train.batch_size * config.train.accumulation * ranks.world
        self.updating = False
        if state.step % config.train.log_every == 0 or state.step == config.train.steps:
            self.check_finite(total, norm)
            self._log_step(step, total, aligned, norm, rate, progress)
        self.view.tick()
        return True

    def _next_batches(self, now: Config) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Exception | None]:
        """The batches of a step, or the error of their data; other processes have to hear of it."""
        train = now.train
        try:
            if self.batches_of != (now.data, train.batch_size):
                self.batches = training_batches(
                    self.data.train,
                    now.data,
                    train.batch_size,
                    seed=train.seed,
                    first_draw=self.state.draws,
                    rank=self.ranks.rank,
                    world=self.ranks.world,
                )
                self.batches_of = now.data, train.batch_size
            return [next(self.batches) for _ in range(train.accumulation)], None
        except Exception as error:
            return [], error

    def _leave_with(self, failure: Exception | None) -> NoReturn:
        """Raise the error of this process or of another one. Bad data is no reason to lose steps."""
        if self.state.step:
            self.save()
            if isinstance(failure, UserError):
                failure = UserError(f"{failure}; {self._how_to_go_on()}")
        self.ranks.agree(failure)
        raise AssertionError("no process has an error")

    def _how_to_go_on(self) -> str:
        out = shlex.quote(str(self.out))
        return f"step {self.state.step} is saved; go on with: flowseg train --out {out} --resume"

    def _backward(self, batch: list[tuple[Tensor, Tensor, Tensor]], valid: float) -> tuple[Objective, Tensor, Tensor]:
        """Gradients of a step. Returns the last batch's objective, this process's part of the loss, and REPA's."""
        config, device, encoder = self.config, self.device, self.encoder
        total, aligned = torch.zeros((), device=device), torch.zeros((), device=device)
        for micro, (images, labels, draws) in enumerate(batch):
            images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
            last = micro == len(batch) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with autocast(config.train.mixed_precision, device):
                    step = flow_step(self.model, self.codebook, config, images, labels, draws, encoder)
                # Processes' gradients are averaged, so each counts its share of the sum as many times as there are.
                value = step.flow * (self.ranks.world / max(valid, 1.0))
                total += value.detach()
                if encoder:
                    aligned += step.align.detach() / len(batch)
                    value = value + step.align * (config.repa.weight / len(batch))
                self.accelerator.backward(value)
            self.window_images += images.shape[0] * self.ranks.world
        return step, total, aligned

    def _log_step(
        self, step: Objective, total: Tensor, aligned: Tensor, norm: Tensor, rate: float, progress: float
    ) -> None:
        error = squared_error(step, self.codebook, self.config)
        sums = self.ranks.add_up(float(total), float(error), float(aligned))
        loss, error, align = (value / self.ranks.world for value in sums)
        speed = self.window_images / max(time.monotonic() - self.window_start, 1e-9)
        self.window_start, self.window_images = time.monotonic(), 0
        self.log(
            event="train",
            step=self.state.step,
            loss=loss,
            squared_error=error,
            **({"align": align} if self.encoder else {}),
            grad_norm=float(norm),
            lr=rate,
            images_per_second=speed,
            seconds=time.monotonic() - self.started,
        )
        self.view.show(loss=loss, speed=speed, fraction=progress, miou=self.result.scores and self.result.scores.miou)

    def check_finite(self, *values: Tensor) -> None:
        """Raise UserError in all processes if one of them holds a value that is no number."""
        wrong = not all(bool(torch.isfinite(_own_part(value)).all()) for value in values)
        if self.ranks.add_up(wrong)[0]:
            raise UserError(
                f"the loss is no longer finite at step {self.state.step}; lower optim.lr or raise loss.eps, then "
                f"--resume from the last checkpoint"
            )

    def save(self, *, passing: bool = False) -> None:
        """Write a checkpoint of this step; if there is one, only its state. The next one replaces a ``passing`` one."""
        state, new = self.state, self.saved != self.state.step
        if new:
            # The newest checkpoint is what a run goes on from: it must not hold weights that are not numbers.
            self.check_finite(*self.bare_model.parameters())
        state.seconds = time.monotonic() - self.started
        with self.ranks.together():
            if new and (self.main or self.sharded):
                path = save_checkpoint(
                    self.out,
                    self.bare_model,
                    self.ema.tensors,
                    self.optimizer,
                    state,
                    self.config.train.keep + passing,
                    write=self.main,
                    replaces=self.passing,
                )
                self.passing = path if passing else None
            elif self.main:
                save_state(self.out, state)
        self.saved = state.step
        if new:
            self.view.saved()

    def _validate_unless_stopped(self) -> bool:
        """Validate, and note it in the checkpoint; False where a signal has cut the validation."""
        try:
            self._validate()
        except _Interrupted:
            return False
        self.save()
        return True

    def _validate(self) -> None:
        config, state, result = self.config, self.state, self.result
        begin = time.monotonic()
        weights = self.ema.tensors if config.sample.weights == "ema" else dict(self.bare_model.named_parameters())
        _copy_into(self.ema_model, weights)
        self.segmenter.config = config.at_step(state.step - 1)
        result.scores = scores = self._scores()
        best = max(state.best_miou, scores.miou)
        with self.ranks.together():
            if self.main and state.validated < state.step:
                result.curve.append((state.step, scores.miou))
                self.log(event="validation", step=state.step, miou=scores.miou, pixel_accuracy=scores.pixel_accuracy)
                if scores.miou > state.best_miou:
                    save_weights(self.out / "best.safetensors", self.ema_model, step=state.step, miou=scores.miou)
                if self.on_validation:
                    self.on_validation(state.step, scores)
        state.best_miou, state.validated = best, state.step
        self.view.validated(scores, best)
        self.view.show(fraction=state.step / config.train.steps, miou=scores.miou)
        self.window_start += time.monotonic() - begin

    def _scores(self) -> Scores:
        """Scores of the validation split; an error names the step that is saved."""
        config, ranks, seen = self.config, self.ranks, 0
        count = len(chosen_indices(len(self.data.val), config.train.eval_images))

        def seen_more(images: int) -> None:
            nonlocal seen
            seen += images * ranks.world
            self.view.validating(seen, count)
            # Several processes would not leave together: they finish the validation first.
            if self.stop and ranks.world == 1:
                raise _Interrupted

        try:
            with ranks.adding_up() as add_up:
                return evaluate(
                    self.segmenter,
                    self.data.val,
                    limit=config.train.eval_images,
                    rank=ranks.rank,
                    world=ranks.world,
                    add_up=add_up,
                    on_batch=seen_more,
                )
        except (PeerError, _Interrupted):
            raise
        except UserError as error:
            raise UserError(f"validation: {error}; {self._how_to_go_on()}") from None
        except Exception as error:
            if not is_out_of_memory(error):
                # A fault of the program: its traceback is wanted.
                say(self.console, f"validation has failed; {self._how_to_go_on()}")
                raise
            batch = config.sample.batch_size
            smaller = f" --set sample.batch_size=1 (now {batch})" if batch > 1 else ""
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"validation ran out of memory ({reason}); {self._how_to_go_on()}{smaller}") from error


def _draws_before(config: Config, step: int, world: int) -> int:
    """Examples that ``world`` processes with these settings draw before ``step``."""
    ends = [stage.at for stage in config.train.stages if stage.at <= step]
    return sum(
        (last - first) * config.at_step(first).train.batch_size * config.train.accumulation * world
        for first, last in itertools.pairwise([0, *ends, step])
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
            text = printable(value) if isinstance(value, str) else json.dumps(value)
            flat[prefix + key] = value if isinstance(value, bool | int | float) else text
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


def _check_trackers(config: Config, out: Path) -> None:
    for name in config.train.trackers:
        if not any(map(importlib.util.find_spec, {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,)))):
            raise UserError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")
    try:
        str(out).encode()
    except UnicodeEncodeError:
        if "tensorboard" in config.train.trackers:
            raise UserError(
                f"train.trackers: tensorboard cannot write to {out}, whose name this locale cannot read; set PYTHONUTF8=1, "
                "or leave it out"
            ) from None


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


def _goes_on(out: Path, resume: bool | Literal["auto"]) -> bool:
    """Whether the run goes on from a checkpoint in ``out``."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    found = bool(list_checkpoints(out))
    if resume == "auto":
        return found
    if resume not in (True, False):
        raise UserError(f"resume must be True, False or 'auto', got {resume!r}")
    if resume and not found:
        raise UserError(
            f"--resume: no checkpoint in {out / 'checkpoints'}; leave --resume out to start anew, or give --resume=auto "
            "to go on only where there is one"
        )
    return resume


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
