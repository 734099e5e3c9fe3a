"""Train a network::

    flowseg train --config configs/digits.yaml --out runs/digits
    flowseg train --data folder --root data --out runs/mine --max-minutes 60 --set "data.classes=[background, road, car]"
    flowseg train --out runs/mine --resume
    accelerate launch --multi_gpu --num_processes 8 -m flowseg train --config configs/ade20k_l16.yaml \
        --root ADEChallengeData2016 --out runs/ade20k

The first trains on embedded digits and needs no download. From Python: ``train(load_config("configs/digits.yaml"), out)``.

:func:`train` prepares the run folder. :class:`Trainer` sets up the network, the optimiser and the files. Its loop
is ``_loop``, which calls ``train_step``, ``save`` and ``validate``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from flowseg.build import build
from flowseg.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_sharded_checkpoint,
    save_state,
    save_weights,
)
from flowseg.config import Config, OptimConfig, SampleConfig, TrainConfig, load_config, save_config
from flowseg.data import open_data
from flowseg.data.label_table import tell_labels
from flowseg.data.loader import Batch
from flowseg.errors import PeerError, UserError
from flowseg.inference.evaluate import Scores, chosen_indices, evaluate
from flowseg.model import FlowSegModel, load_pixnerd
from flowseg.model.compiling import compiler_needed
from flowseg.model.flops import count_flops
from flowseg.runs.memory import is_out_of_memory, keep_freed_memory
from flowseg.runs.metrics import open_metrics, truncate_metrics
from flowseg.runs.parallel import Ranks, copy_parameters, local_part, shard, whole
from flowseg.runs.progress import TrainingView, setup_line, training_view
from flowseg.runs.signals import stop_on_signal
from flowseg.runs.speed import SpeedWindow
from flowseg.runs.terminal import say
from flowseg.segment import Segmenter, autocast, default_device, resolve_precision
from flowseg.training.alignment import ImageFeatures
from flowseg.training.batches import StepBatches, examples_before, examples_per_step
from flowseg.training.device_copies import DeviceCopies
from flowseg.training.ema import Ema
from flowseg.training.objective import Objective, flow_step, squared_error
from flowseg.training.run_folder import (
    check_same_checkpoints,
    check_same_meaning,
    check_shared,
    check_steps_left,
    locked,
    should_resume,
)
from flowseg.training.schedule import learning_rate
from flowseg.training.trackers import check_trackers, repeat_step, start_trackers


@dataclasses.dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        state: step, time and best mIoU.
        scores: scores of the last validation, if there was one.
        stopped_by: ``"steps"``, ``"time"``, or the number of the signal.
        curve: ``(step, mIoU)`` of every validation in this call.
    """

    state: TrainState
    scores: Scores | None
    stopped_by: str | int
    curve: list[tuple[int, float]]


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

    The run folder ``out`` receives ``config.yaml`` (the resolved settings), ``metrics.jsonl``, ``checkpoints/``, and
    ``best.safetensors``: the weights with the highest validation mIoU (averaged weights unless ``sample.weights`` says
    otherwise). SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 end the run after the current step, with a checkpoint. A
    checkpoint is also written before each validation, so a failed validation loses no step.

    The loss of a step is the mean over all labelled pixels of all its examples. It does not depend on how the examples are
    divided among accumulated batches and processes.

    Args:
        config: all settings.
        out: run folder; must not contain a run unless ``resume``.
        resume: continue from the newest checkpoint in ``out``; ``"auto"`` continues if there is one and starts a new run if
            not. On a CPU in float32 the resumed run is bit for bit the uninterrupted one, unless a time limit changes the
            learning rate. With another batch size or number of processes the run continues with the next example.
        console: where to print progress; ``None`` prints nothing.
        title: name of the run in the progress output.
        on_validation: called with the step and the scores after each validation.

    Raises:
        UserError: data or settings that cannot work, an ``out`` that is in use, a loss that is no longer finite, or a failed
            validation. If there are several processes, one raises UserError and the others raise PeerError.
    """
    if not torch.accelerator.is_available():
        keep_freed_memory()
    config = config.model_copy(deep=True)
    config.train.mixed_precision = resolve_precision(config.train.mixed_precision, default_device())
    out = Path(out)
    check_trackers(config.train.trackers, out)
    # We do autocast ourselves: Accelerate keeps the first precision for the whole process, and a demo may use two.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.accelerator.is_available(),
        log_with=config.train.trackers or None,
        project_dir=out,
    )
    ranks = Ranks(accelerator.num_processes, accelerator.process_index)
    check_same_checkpoints(out, ranks)
    with contextlib.ExitStack() as stack:
        with ranks.together():
            resume = should_resume(out, resume)
            if accelerator.is_main_process:
                stack.enter_context(locked(out))
            if not resume and list_checkpoints(out):
                raise UserError(
                    f"--out {out}: already contains a run; add --resume to continue it, or give another folder"
                )
        if config.train.checkpoint == "sharded" and ranks.world > 1:
            check_shared(out, ranks)
        trainer = Trainer(
            config, out, accelerator, ranks, resume=resume, console=console, title=title, on_validation=on_validation
        )
        return trainer.train()


class Trainer:
    """One run: its network, optimiser, data and files. The arguments are those of :func:`train`."""

    def __init__(
        self,
        config: Config,
        out: Path,
        accelerator: Accelerator,
        ranks: Ranks,
        *,
        resume: bool = False,
        console: Console | None = None,
        title: str = "train",
        on_validation: Callable[[int, Scores], None] | None = None,
    ):
        self.config, self.out, self.accelerator, self.ranks = config, out, accelerator, ranks
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.console, self.title, self.on_validation = console if self.is_main else None, title, on_validation
        with ranks.together():
            if resume:
                check_steps_left(config, out)
                check_same_meaning(config, out)
            self.data = open_data(config.data, seed=config.train.seed, check=self.is_main)
            if self.is_main and config.data.check != "none":
                tell_labels(self.data, config.data.name, self.console)
            self._build_network(config, resume)
        self._prepare_for_training(config.optim, config.train, compiled=config.model.compile)
        self.batches = StepBatches(self.data.train, ranks, self.console)
        self.copy_to_device = DeviceCopies(self.device)

        self.state = self._load_newest_checkpoint() if resume else TrainState()
        self.saved_step = self.state.step if resume else -1
        # The newest checkpoint, if only a coming validation was the reason to write it. The next checkpoint replaces it.
        self.temporary_checkpoint: Path | None = None
        # True while the weights belong to a step that self.state does not count yet.
        self.is_updating = False
        self.result = TrainResult(self.state, None, "steps", [])
        self._open_files(resume)

        # Placeholders: train() sets the signals, the progress view and the log.
        self.signals: list[int] = []
        self.view = TrainingView()
        self.log: Callable[..., None] = lambda **_: None
        # Model FLOPs of a training step per image, by the size of the image.
        self.flops = {size: count_flops(config, *size).training for size in _image_sizes(config)}
        self.window = SpeedWindow(ranks, self.device)
        self.start = time.monotonic() - self.state.seconds
        self.time_limit = config.train.max_minutes * 60 if config.train.max_minutes else math.inf

    # ---- Set up ----

    def _build_network(self, config: Config, resume: bool) -> None:
        """Build the network, its averaged copy, the codebook, and REPA's encoder if ``repa.weight`` is not 0."""
        self.encoder = None
        if config.repa.weight:
            self.encoder = ImageFeatures.from_pretrained(config.repa.encoder).to(self.device)
        align_dim = self.encoder.dim if self.encoder else None
        self.bare_model, codebook = build(config, self.data.num_classes, align_dim=align_dim)
        depth = self.bare_model.size.depth
        if config.repa.weight and config.repa.block > depth:
            raise UserError(f"repa.block must be at most the {depth} blocks of the model, got {config.repa.block}")
        if config.model.pixnerd and not resume:
            report = load_pixnerd(self.bare_model, config.model.pixnerd)
            say(self.console, f"{config.model.pixnerd}: {report}")
        self.codebook = codebook.to(self.device)
        self.bare_model.to(self.device)
        self.scored_model = copy.deepcopy(self.bare_model).requires_grad_(False)
        self.scored_model.projector = None
        self.segmenter = Segmenter(self.scored_model, self.codebook, config, self.device, compiled=config.model.compile)

    def _prepare_for_training(self, optim: OptimConfig, train: TrainConfig, *, compiled: bool) -> None:
        """Shard the network (FSDP), create its averages and its optimiser, compile it and prepare it for DDP."""
        self.is_sharded = train.strategy == "fsdp" and self.ranks.world > 1
        # The compiled model shares its parameters with bare_model, whose parameter names go into checkpoints.
        model = _compiled(self.bare_model, self.is_sharded) if compiled else self.bare_model
        if self.is_sharded:
            shard(self.bare_model)
        self.ema = Ema(self.bare_model, optim.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.bare_model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.model = model if self.is_sharded else self.accelerator.prepare_model(model)

    def _load_newest_checkpoint(self) -> TrainState:
        newest = list_checkpoints(self.out)[-1]
        state = load_checkpoint(newest, self.bare_model, self.ema.tensors, self.optimizer, self.ranks)
        # Checkpoints of earlier versions do not record the draws.
        if state.draws is None:
            settings = self.out / "config.yaml"
            before = load_config(settings) if settings.is_file() else self.config
            state.draws = examples_before(before, state.step, self.ranks.world)
        now = examples_per_step(self.config.at_step(max(state.step - 1, 0)), self.ranks.world)
        if state.examples not in (None, now):
            say(self.console, f"note: {state.examples} examples per step before, {now} now")
        # _open_files replaces the old settings: wait until every process has read them.
        self.accelerator.wait_for_everyone()
        return state

    def _open_files(self, resume: bool) -> None:
        """Write the settings, drop metrics that the run will log again, and start the trackers."""
        metrics = self.out / "metrics.jsonl"
        if self.is_main:
            save_config(self.config, self.out / "config.yaml")
            if resume:
                truncate_metrics(metrics, step=self.state.step, validated=self.state.validated)
            else:
                # A run that never wrote a checkpoint may have left these files.
                for name in ("metrics.jsonl", "best.safetensors"):
                    (self.out / name).unlink(missing_ok=True)
        if self.config.train.trackers:
            start_trackers(self.accelerator, self.config, self.state.step)
            if resume:
                repeat_step(self.accelerator, metrics, self.state.step)

    # ---- Train ----

    def train(self) -> TrainResult:
        """Train until the steps, the time limit or a signal end the run."""
        train, examples = self.config.train, examples_per_step(self.config.at_step(self.state.step), self.ranks.world)
        line = setup_line(self.ranks.world, train.strategy, self.device.type, train.mixed_precision, examples)
        say(self.console, f"{self.title.strip()}: {line}")
        with (
            open_metrics(self.out / "metrics.jsonl", self.accelerator) as self.log,
            stop_on_signal() as self.signals,
            training_view(self.console, self.title, self.config.train.steps, lambda: self.state.step) as self.view,
        ):
            self.model.train()
            try:
                self._loop(self.config.train)
            except Exception:
                self._save_after_error()
                raise
            stopped_by = self.result.stopped_by
            self.view.ended(stopped_by if isinstance(stopped_by, str) else "a signal")
        self.accelerator.wait_for_everyone()
        if self.config.train.trackers:
            self.accelerator.end_training()
        return self.result

    def _loop(self, train: TrainConfig) -> None:
        """Alternate between steps, checkpoints and validations; end with a checkpoint and a validation."""
        state, result = self.state, self.result
        if self._is_validation_due(train) and state.validated < state.step:
            self.validate()
        while state.step < train.steps and self.train_step(self.config.at_step(state.step)):
            # A single process stops at once. Several processes stop together, at the start of the next step.
            if self.signals and self.ranks.world == 1:
                result.stopped_by = self.signals[0]
                break
            if state.step % train.checkpoint_every == 0:
                self.save()
            if self._is_validation_due(train):
                self.save(temporary=True)
                self.validate()
        self.save()
        was_stopped = isinstance(result.stopped_by, int)
        if not was_stopped and not self.validate():
            result.stopped_by = self.signals[0]

    def _is_validation_due(self, train: TrainConfig) -> bool:
        """Whether a validation follows the current step; the last step is left out, as every run ends with a validation."""
        step = self.state.step
        return step > 0 and step % train.eval_every == 0 and step < train.steps

    def train_step(self, stage: Config) -> bool:
        """Do one optimiser step with the settings of the current stage.

        Return False, without a step, if a signal or the time limit ends the run here.
        """
        state = self.state
        # The first step of a stage compiles once if the tables of its size exist.
        self.bare_model.prepare(stage.data.height, stage.data.width, self.device)
        batches, failure = self._load_batches(stage)
        agreed = self._agree_to_continue(batches, failure)
        if agreed is None:
            return False
        labelled, progress = agreed
        rate = learning_rate(stage.optim, state.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with compiler_needed():
            objective, loss, align = self._backward(batches, labelled)
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), stage.optim.grad_clip))
        self.is_updating = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.bare_model, state.step)
        state.step += 1
        state.examples = examples_per_step(stage, self.ranks.world)
        state.draws += state.examples
        self.window.add(state.examples // self.ranks.world, self.flops[stage.data.height, stage.data.width])
        self.is_updating = False
        if state.step % stage.train.log_every == 0 or state.step == stage.train.steps:
            self._log_step(objective, loss, align, norm, rate, progress)
        self.view.tick()
        return True

    def _load_batches(self, stage: Config) -> tuple[list[Batch], Exception | None]:
        """Load the batches of the next step. Return an error instead of raising it: all processes have to learn of it."""
        try:
            with self.window.waiting():
                return self.batches.next_step(stage, self.state.draws), None
        except Exception as error:
            return [], error

    def _agree_to_continue(self, batches: list[Batch], failure: Exception | None) -> tuple[float, float] | None:
        """Agree with the other processes on the next step.

        Return the number of labelled pixels in all processes and the share of the run that is done, or None if a signal or
        the time limit ends the run.
        """
        labelled = sum(batch.labelled for batch in batches)
        # Clocks differ between processes, and the learning rate follows the clock. So the first process decides.
        elapsed = time.monotonic() - self.start if self.is_main else 0.0
        elapsed, labelled, signals, failures = self.ranks.add_up(
            elapsed, labelled, len(self.signals), failure is not None
        )
        if signals:
            # A failure at the same time comes from the signal: launchers send it to the loader's workers too, which die of it.
            self.result.stopped_by = self.signals[0] if self.signals else signal.SIGTERM
            return None
        if failures:
            self._save_and_raise(failure)
        if elapsed >= self.time_limit:
            self.result.stopped_by = "time"
            return None
        return labelled, max(self.state.step / self.config.train.steps, elapsed / self.time_limit)

    def _save_and_raise(self, failure: Exception | None) -> NoReturn:
        """Save, then raise this process's failure, or PeerError if another process has failed."""
        if self.state.step:
            self.save()
            if isinstance(failure, UserError):
                failure = UserError(f"{failure}; {self._how_to_resume()}")
        self.ranks.agree(failure)
        raise AssertionError("no process has an error")

    def _backward(self, batches: list[Batch], labelled: float) -> tuple[Objective, Tensor, Tensor]:
        """Compute the gradients of a step.

        Return the objective of the last batch, this process's part of the loss, and REPA's loss.
        """
        config, device = self.config, self.device
        loss, align = torch.zeros((), device=device), torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            batch = self.copy_to_device(batch)
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with autocast(config.train.mixed_precision, device):
                    objective = flow_step(self.model, self.codebook, config, batch, self.encoder)
                # Gradients are averaged over processes; multiplying by their number makes the result a sum.
                value = objective.flow * (self.ranks.world / max(labelled, 1.0))
                loss += value.detach()
                if self.encoder:
                    align += objective.align.detach() / len(batches)
                    value = value + objective.align * (config.repa.weight / len(batches))
                self.accelerator.backward(value)
        return objective, loss, align

    def _log_step(
        self, objective: Objective, loss: Tensor, align: Tensor, norm: Tensor, rate: float, progress: float
    ) -> None:
        error = squared_error(objective, self.codebook, self.config)
        # Read the device once: each read waits for all work queued there.
        found = torch.stack([value.float() for value in (loss, error, align, norm)]).tolist()
        self._raise_if_diverged(not (math.isfinite(found[0]) and math.isfinite(found[3])))
        sums = self.ranks.add_up(*found[:3])
        mean_loss, mean_error, mean_align = (value / self.ranks.world for value in sums)
        speed = self.window.close()
        self.log(
            event="train",
            step=self.state.step,
            loss=mean_loss,
            squared_error=mean_error,
            **({"align": mean_align} if self.encoder else {}),
            grad_norm=found[3],
            lr=rate,
            **speed,
            seconds=time.monotonic() - self.start,
        )
        miou = self.result.scores and self.result.scores.miou
        self.view.show(
            fraction=progress,
            loss=mean_loss,
            speed=speed["images_per_second"],
            memory=speed.get("memory_gib"),
            wait=speed["data_wait_share"],
            workers=self.batches.workers,
            miou=miou,
        )

    def _check_finite(self, *values: Tensor) -> None:
        """Raise UserError in all processes if a value in one of them is infinite or NaN. Every process must call this."""
        # Read the device once, not once per tensor.
        finite = torch.stack([torch.isfinite(local_part(value)).all() for value in values])
        self._raise_if_diverged(not bool(finite.all()))

    def _raise_if_diverged(self, diverged: bool) -> None:
        """Raise UserError in all processes if the loss of one of them is no longer finite. Every process must call this."""
        if self.ranks.add_up(diverged)[0]:
            raise UserError(
                f"the loss is no longer finite at step {self.state.step}; lower optim.lr or raise loss.eps, then "
                f"--resume from the last checkpoint"
            )

    # ---- Save ----

    def save(self, *, temporary: bool = False) -> None:
        """Write a checkpoint of the current step, or only its state if its tensors are saved already.

        The next checkpoint replaces a ``temporary`` one.
        """
        state, is_new = self.state, self.saved_step != self.state.step
        if is_new:
            # A run resumes from its newest checkpoint, which therefore must not contain NaN.
            self._check_finite(*self.bare_model.parameters())
        begin = time.monotonic()
        state.seconds = begin - self.start
        if is_new:
            self._write_checkpoint(temporary)
        else:
            with self.ranks.together():
                if self.is_main:
                    save_state(self.out, state)
        self.saved_step = state.step
        self.window.leave_out_since(begin)
        if is_new:
            self.view.saved()

    def _write_checkpoint(self, temporary: bool) -> None:
        """Write a checkpoint, whole or sharded, and remember it if the next one replaces it. A collective."""
        keep, replaces, path = self.config.train.keep + temporary, self.temporary_checkpoint, None
        parts = self.out, self.bare_model, self.ema.tensors, self.optimizer, self.state, keep
        if self.config.train.checkpoint == "sharded" and self.ranks.world > 1:
            path = save_sharded_checkpoint(*parts, self.ranks, replaces=replaces)
        else:
            with self.ranks.together():
                if self.is_main or self.is_sharded:
                    path = save_checkpoint(*parts, write=self.is_main, replaces=replaces)
        self.temporary_checkpoint = path if temporary else None

    def _save_after_error(self) -> None:
        """After an error in a single process, save the steps since the last checkpoint.

        With several processes nothing is saved: the save is a collective, and the failed process would not join it.
        """
        if self.ranks.world > 1 or self.is_updating or self.state.step <= max(self.saved_step, 0):
            return
        with contextlib.suppress(Exception):
            self.save()
            say(self.console, self._how_to_resume())

    def _how_to_resume(self) -> str:
        out = shlex.quote(str(self.out))
        return f"step {self.state.step} is saved; continue with: flowseg train --out {out} --resume"

    # ---- Validate ----

    def validate(self) -> bool:
        """Score the validation split, log the scores and keep the best weights. Return False if a signal interrupts this."""
        begin = time.monotonic()
        try:
            self.result.scores = scores = self._score(self.config.sample, self.config.train)
        except _Interrupted:
            return False
        state = self.state
        best = max(state.best_miou, scores.miou)
        with self.ranks.together():
            if self.is_main and state.validated < state.step:
                self._keep_scores(scores)
        state.best_miou, state.validated = best, state.step
        self.view.validated(scores.miou, scores.pixel_accuracy, scores.images, best)
        self.view.show(fraction=state.step / self.config.train.steps, miou=scores.miou)
        self.window.leave_out_since(begin)
        self.save()
        return True

    def _keep_scores(self, scores: Scores) -> None:
        """Log new scores, save the weights if they are the best so far, and tell the caller of :func:`train`."""
        step = self.state.step
        self.result.curve.append((step, scores.miou))
        self.log(event="validation", step=step, miou=scores.miou, pixel_accuracy=scores.pixel_accuracy)
        if scores.miou > self.state.best_miou:
            save_weights(self.out / "best.safetensors", self.scored_model, step=step, miou=scores.miou)
        if self.on_validation:
            self.on_validation(step, scores)

    def _score(self, sample: SampleConfig, train: TrainConfig) -> Scores:
        """Score the validation split at the image size of the current stage, with the weights that ``sample.weights`` selects.

        Raises:
            UserError: the validation has failed; the message names the step that is saved.
        """
        weights = self.ema.tensors if sample.weights == "ema" else dict(self.bare_model.named_parameters())
        copy_parameters(self.scored_model, weights)
        self.segmenter.config = self.config.at_step(self.state.step - 1)
        ranks, done = self.ranks, 0
        total = len(chosen_indices(len(self.data.val), train.eval_images))

        def after_batch(images: int) -> None:
            nonlocal done
            done += images * ranks.world
            self.view.validating(done, total)
            # Several processes would not stop at the same batch: they finish the validation first.
            if self.signals and ranks.world == 1:
                raise _Interrupted

        try:
            with ranks.adding_up() as add_up:
                return evaluate(
                    self.segmenter,
                    self.data.val,
                    limit=train.eval_images,
                    rank=ranks.rank,
                    world=ranks.world,
                    add_up=add_up,
                    on_batch=after_batch,
                )
        except (PeerError, _Interrupted):
            raise
        except UserError as error:
            raise UserError(f"validation: {error}; {self._how_to_resume()}") from None
        except Exception as error:
            if not is_out_of_memory(error):
                # A bug: let the traceback through.
                say(self.console, f"validation has failed; {self._how_to_resume()}")
                raise
            smaller = f" --set sample.batch_size=1 (now {sample.batch_size})" if sample.batch_size > 1 else ""
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"validation ran out of memory ({reason}); {self._how_to_resume()}{smaller}") from error
        finally:
            # CUDA graphs keep the memory of a call, which training needs now.
            self.segmenter.free_graphs()


def _compiled(model: FlowSegModel, is_sharded: bool) -> torch.nn.Module:
    """Compile a network for training: as one graph, or one graph per block if its parameters will be sharded.

    FSDP's hooks between the blocks break a graph of the whole network inside a loop, and then nothing of it is compiled.
    """
    if not is_sharded:
        return torch.compile(model, fullgraph=True)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
    return model


def _image_sizes(config: Config) -> set[tuple[int, int]]:
    """Height and width of the training images in each stage of a run."""
    stages = [config.data, *config.train.stages]
    return {(stage.height, stage.width) for stage in stages}


class _Interrupted(Exception):
    """A signal arrived during a validation."""
