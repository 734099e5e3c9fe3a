"""Checkpoints: safetensors and JSON only, complete or absent, never half written, with checksums that reading verifies."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowseg.config import Config, load_config, override
from flowseg.errors import UserError
from flowseg.runs.files import replacing
from flowseg.runs.parallel import sharded_like, whole

PREFIX = "step-"
CHECKSUM = "sha256"
REPLACED = ".replaced"


@dataclasses.dataclass
class TrainState:
    """What a run needs to go on besides tensors.

    Order, augmentation, times and noise are functions of the seed and of the number of examples drawn before, so there is
    no generator state to keep.

    Attributes:
        step: optimiser steps done.
        seconds: wall-clock time used.
        best_miou: best validation mIoU in percent so far, -1 before the first.
        validated: step of the newest validation.
        draws: examples that all processes together have drawn; ``None`` in checkpoints of earlier versions.
    """

    step: int = 0
    seconds: float = 0.0
    best_miou: float = -1.0
    validated: int = 0
    draws: int | None = 0


def save_checkpoint(
    run: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    keep: int,
    *,
    write: bool = True,
    replaces: Path | None = None,
) -> Path:
    """Write ``run/checkpoints/step-NNNNNNNN`` under a temporary name, rename it, drop all but the ``keep`` newest.

    ``replaces`` is an earlier checkpoint that is dropped first. With sharded parameters every process must call this; those
    without ``write`` only give their parts.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are as they were.
    """
    files = {
        "model.safetensors": _plain(model.state_dict()),
        "ema.safetensors": _plain(model.state_dict() | ema),
        "optimizer.safetensors": _optimizer_tensors(model, optimizer),
    }
    folder = run / "checkpoints"
    final = folder / f"{PREFIX}{state.step:08d}"
    if not write:
        return final
    temporary = folder / f".{final.name}.{os.getpid()}"
    kept = list_checkpoints(run)
    try:
        # Also what a killed process left: it may be what fills the disk.
        for left in folder.glob(f".{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            _write(temporary / name, tensors, {})
            _write_state(temporary / "state.json", state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = f"{kept[-1].name} is intact, --resume goes on from it" if kept else "there is no earlier one"
        raise UserError(f"{final}: cannot be written ({error}); free disk space. {good}") from None
    if final.exists():
        final.rename(temporary.with_suffix(REPLACED))
    temporary.rename(final)
    shutil.rmtree(temporary.with_suffix(REPLACED), ignore_errors=True)
    wanted = [path for path in list_checkpoints(run) if path != replaces][-keep:]
    for old in set(list_checkpoints(run)) - {final, *wanted}:
        # Out of the way first: a process killed while it deletes leaves what the next save clears away.
        with contextlib.suppress(OSError):
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.dropped")), ignore_errors=True)
    return final


def save_state(run: Path, state: TrainState) -> None:
    """Replace the state in the checkpoint of ``state.step``, whose tensors stay as they are.

    Raises:
        UserError: the disk is full or the folder cannot be written; the checkpoint is as it was.
    """
    path = run / "checkpoints" / f"{PREFIX}{state.step:08d}" / "state.json"
    if not path.parent.is_dir():
        # Somebody has removed the checkpoint; the next one holds the state.
        return
    try:
        with replacing(path) as temporary:
            _write_state(temporary, state)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free disk space. The checkpoint is intact") from None


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    for left in (run / "checkpoints").glob(f".{PREFIX}*{REPLACED}"):
        # A process was killed between taking this one's place and filling it.
        place = left.with_name(left.name.split(".")[1])
        with contextlib.suppress(OSError):
            if not place.exists():
                left.rename(place)
    return sorted(path for path in (run / "checkpoints").glob(f"{PREFIX}*") if (path / "state.json").is_file())


def load_checkpoint(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> TrainState:
    """Put a checkpoint's numbers into ``model``, ``ema`` and ``optimizer`` (in place) and return its state.

    Raises:
        UserError: a missing or damaged file, or tensors of another model.
    """
    try:
        fields = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if CHECKSUM in fields and fields.pop(CHECKSUM) != _checksum({}, fields):
            raise ValueError(f"state.json: {_OTHER_NUMBERS}")
        state = TrainState(**{"draws": None, **fields})
        tensors = read_tensors(path / "optimizer.safetensors")
    except (OSError, UserError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); remove it to go on from the one before") from None
    load_weights(model, path / "model.safetensors")
    with torch.no_grad():
        for name, value in read_tensors(path / "ema.safetensors").items():
            if name in ema:
                ema[name].copy_(sharded_like(value, ema[name]))
    template = optimizer.state_dict()
    per_parameter = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        fields = {key.split("/", 1)[0]: value for key, value in tensors.items() if key.split("/", 1)[1] == name}
        if fields:
            per_parameter[index] = {field: sharded_like(value, parameter) for field, value in fields.items()}
    optimizer.load_state_dict({"state": per_parameter, "param_groups": template["param_groups"]})
    return state


def save_weights(path: Path, model: nn.Module, **facts: Any) -> None:
    """Write the weights of ``model`` as one file with ``facts`` in its header, through a temporary name."""
    tensors = _plain(model.state_dict())
    try:
        with replacing(path) as temporary:
            _write(temporary, tensors, {key: str(value) for key, value in facts.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); free disk space. An earlier one is as it was") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; one without a checksum is taken as it is.

    Raises:
        UserError: a missing or damaged file.
    """
    try:
        tensors, facts = load_file(path), _header(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    if CHECKSUM in facts and facts.pop(CHECKSUM) != _checksum(tensors, facts):
        raise UserError(f"{path}: damaged, {_OTHER_NUMBERS}; use another checkpoint")
    return tensors


def read_facts(path: Path) -> dict[str, str]:
    """The header facts that :func:`save_weights` wrote."""
    return {key: value for key, value in _header(path).items() if key != CHECKSUM}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a safetensors file.

    Raises:
        UserError: names or shapes of another model.
    """
    own = model.state_dict()
    tensors = {
        name: sharded_like(value, own[name]) if name in own else value
        for name, value in read_tensors(path).items()
        # Only training with REPA has the projector.
        if name in own or not name.startswith("projector.")
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: weights of another model than the settings describe ({reason})") from None


def find_weights(run: Path, checkpoint: str = "latest", weights: str = "ema") -> Path:
    """The weight file of a run.

    Args:
        run: folder written by training.
        checkpoint: ``"latest"``, ``"best"`` (highest validation mIoU, averaged weights), a step number, or a path to
            a safetensors file.
        weights: ``"ema"`` or ``"model"``.

    Raises:
        UserError: nothing there; the message lists what is.
    """
    if checkpoint == "best":
        path = run / "best.safetensors"
        if not path.is_file():
            raise UserError(f"{run}: no best.safetensors; the run has not been validated yet, use --checkpoint latest")
        return path
    if checkpoint == "latest":
        found = list_checkpoints(run)
        if not found:
            raise UserError(f"{run}: no checkpoint in {run / 'checkpoints'}; train first, or give another --run")
        return found[-1] / f"{weights}.safetensors"
    if checkpoint.isdigit():
        path = run / "checkpoints" / f"{PREFIX}{int(checkpoint):08d}" / f"{weights}.safetensors"
        if not path.is_file():
            steps = ", ".join(str(int(found.name.removeprefix(PREFIX))) for found in list_checkpoints(run)) or "none"
            raise UserError(f"--checkpoint {checkpoint}: no such step in {run}; steps kept: {steps}")
        return path
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"--checkpoint must be latest, best, a step or a .safetensors file, got {checkpoint!r}")
    return path


def read_run_config(
    run: Path,
    pairs: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    *,
    checkpoint: str = "latest",
) -> Config:
    """The settings of a run with some replaced; of a run with several stages, those of the checkpoint's stage.

    Raises:
        UserError: not a run folder, or a setting replaced that gives what was learnt another meaning.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"run folder {run}: no config.yaml there; give a folder written by 'flowseg train --out'")
    config = load_config(run / "config.yaml")
    step = _trained_steps(run, checkpoint)
    stage = config.at_step(config.train.steps if step is None else max(step - 1, 0))
    replaced = override(stage.model_dump(mode="json"), pairs, flags)
    check_meaning(config, replaced, run)
    return replaced


def _trained_steps(run: Path, checkpoint: str) -> int | None:
    """How many steps a checkpoint has seen, where that is known."""
    if checkpoint.isdigit():
        return int(checkpoint)
    if checkpoint == "latest":
        return max((int(path.name.removeprefix(PREFIX)) for path in list_checkpoints(run)), default=None)
    path = run / "best.safetensors" if checkpoint == "best" else Path(checkpoint)
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
        return int(read_facts(path)["step"])
    return None


def check_meaning(before: Config, after: Config, run: Path) -> None:
    """Refuse settings under which the numbers that a network has learnt to give would be taken for something else.

    Raises:
        UserError: naming the setting.
    """
    old, new = before.flat(), after.flat()
    for key in (
        "codes.channels",
        "codes.sequence",
        "flow.predicts",
        "flow.source",
        "loss.kind",
        "model.condition_on_image",
    ):
        was, now = old[key], new[key]
        if was != now:
            raise UserError(f"{key}: {run} was trained with {was!r}, got {now!r}; train another run for that")


_OTHER_NUMBERS = "its numbers are not those that its checksum was taken of"


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """A safetensors file with ``facts`` and a checksum in its header, on the disk when this returns."""
    save_file(tensors, path, metadata={**facts, CHECKSUM: _checksum(tensors, facts)})
    with path.open("rb") as file:
        _to_disk(file)


def _write_state(path: Path, state: TrainState) -> None:
    fields = dataclasses.asdict(state)
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**fields, CHECKSUM: _checksum({}, fields)}, indent=1))
        _to_disk(file)


def _to_disk(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """SHA-256 of facts, names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value.detach()).cpu().contiguous() for name, value in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return _plain(
        {f"{field}/{names[index]}": value for index, fields in state.items() for field, value in fields.items()}
    )
