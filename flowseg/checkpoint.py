"""Checkpoints: safetensors and JSON files, complete or absent, with checksums that are verified when they are read.

A sharded checkpoint has folders instead of safetensors files, with a file of each process (:mod:`flowseg.shards`).
"""

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
from flowseg.model.sizes import ModelSize, resolve_size
from flowseg.runs.files import replacing
from flowseg.runs.parallel import Ranks, sharded_like, whole
from flowseg.shards import LIST, fill_from_shards, read_shards, shapes, verify_shards, write_shards

PREFIX = "step-"
CHECKSUM = "sha256"
REPLACED = ".replaced"


@dataclasses.dataclass
class TrainState:
    """State of a run, besides tensors, that a checkpoint keeps.

    No generator state is needed: order, augmentation, times and noise depend only on the seed and the number of examples
    drawn before.

    Attributes:
        step: optimiser steps done.
        seconds: wall-clock time used.
        best_miou: best validation mIoU so far in percent; -1 before the first validation.
        validated: step of the newest validation.
        draws: number of examples that all processes together have drawn; ``None`` in checkpoints of earlier versions.
        examples: number of them in the newest step; ``None`` before the first step, and in checkpoints of earlier versions.
    """

    step: int = 0
    seconds: float = 0.0
    best_miou: float = -1.0
    validated: int = 0
    draws: int | None = 0
    examples: int | None = None


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
    """Write ``run/checkpoints/step-NNNNNNNN`` under a temporary name, rename it, and delete all but the ``keep`` newest.

    Args:
        run: run folder.
        model, ema, optimizer, state: what to save.
        keep: number of checkpoints to keep.
        write: ``False`` writes nothing: the process only takes part in gathering sharded parameters, a collective.
        replaces: an earlier checkpoint that is deleted and does not count.

    Raises:
        UserError: the disk is full or the folder cannot be written. Earlier checkpoints stay as they were.
    """
    files = {
        "model.safetensors": _plain(model.state_dict(), keep=write),
        "ema.safetensors": _plain(model.state_dict() | ema, keep=write),
        "optimizer.safetensors": _plain(_optimizer_tensors(model, optimizer), keep=write),
    }
    final, temporary = _places(run, state, os.getpid())
    if not write:
        return final
    try:
        _make_empty(temporary)
        for name, tensors in files.items():
            _write(temporary / name, tensors, {})
        _write_state(temporary / "state.json", state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritten(run, final, error) from None
    _publish(temporary, final, keep, replaces)
    return final


def save_sharded_checkpoint(
    run: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    keep: int,
    ranks: Ranks,
    *,
    replaces: Path | None = None,
) -> Path:
    """Write a checkpoint as :func:`save_checkpoint` does, in which each process writes a part of every tensor. A collective.

    The first process renames the folder when all have written.

    Args:
        run: run folder, which all processes must see.
        model, ema, optimizer, state: what to save.
        keep: number of checkpoints to keep.
        ranks: the processes.
        replaces: an earlier checkpoint that is deleted and does not count.

    Raises:
        UserError: a disk is full or the folder cannot be written; the other processes raise PeerError. Earlier checkpoints
            stay as they were.
    """
    folders = {
        "model": model.state_dict(),
        "ema": model.state_dict() | ema,
        "optimizer": _optimizer_tensors(model, optimizer),
    }
    is_first = ranks.rank == 0
    final, temporary = _places(run, state, ranks.from_first(os.getpid()))
    try:
        with ranks.together():
            if is_first:
                _make_empty(temporary)
        write_shards(temporary, folders, ranks)
        with ranks.together():
            if is_first:
                _write_state(temporary / "state.json", state)
                _publish(temporary, final, keep, replaces)
    except Exception as error:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise _unwritten(run, final, error) from None
        raise
    return final


def _places(run: Path, state: TrainState, process: int) -> tuple[Path, Path]:
    """The final and the temporary name of a checkpoint."""
    final = run / "checkpoints" / f"{PREFIX}{state.step:08d}"
    return final, final.with_name(f".{final.name}.{process}")


def _make_empty(temporary: Path) -> None:
    """Make the temporary folder. Delete what killed processes left, which may be what fills the disk."""
    for left in temporary.parent.glob(f".{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)


def _unwritten(run: Path, final: Path, error: Exception) -> UserError:
    kept = list_checkpoints(run)
    good = f"{kept[-1].name} is intact, --resume continues from it" if kept else "there is no earlier checkpoint"
    return UserError(f"{final}: cannot be written ({error}); free disk space. {good}")


def _publish(temporary: Path, final: Path, keep: int, replaces: Path | None) -> None:
    """Rename a complete checkpoint to its final name, and delete all but the ``keep`` newest."""
    run = final.parent.parent
    if final.exists():
        final.rename(temporary.with_suffix(REPLACED))
    temporary.rename(final)
    shutil.rmtree(temporary.with_suffix(REPLACED), ignore_errors=True)
    wanted = [path for path in list_checkpoints(run) if path != replaces][-keep:]
    for old in set(list_checkpoints(run)) - {final, *wanted}:
        # Rename first: if the process is killed while it deletes, the next save removes the rest.
        with contextlib.suppress(OSError):
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.dropped")), ignore_errors=True)


def save_state(run: Path, state: TrainState) -> None:
    """Replace the state in the checkpoint of ``state.step``, without its tensors.

    Raises:
        UserError: the disk is full or the folder cannot be written. The checkpoint stays as it was.
    """
    path = run / "checkpoints" / f"{PREFIX}{state.step:08d}" / "state.json"
    if not path.parent.is_dir():
        # Somebody has deleted the checkpoint; the next checkpoint will contain the state.
        return
    try:
        with replacing(path) as temporary:
            _write_state(temporary, state)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free disk space. The checkpoint is intact") from None


def list_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    for left in (run / "checkpoints").glob(f".{PREFIX}*{REPLACED}"):
        # A process was killed after renaming this checkpoint and before its replacement had the name: rename it back.
        place = left.with_name(left.name.split(".")[1])
        with contextlib.suppress(OSError):
            if not place.exists():
                left.rename(place)
    return sorted(path for path in (run / "checkpoints").glob(f"{PREFIX}*") if (path / "state.json").is_file())


def load_checkpoint(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> TrainState:
    """Load a checkpoint, in one file or sharded, into ``model``, ``ema`` and ``optimizer`` in place, and return its state.

    Args:
        path: folder of the checkpoint.
        model, ema, optimizer: what to load into, sharded in any way.
        ranks: the processes of the run, if there are several.

    Raises:
        UserError: a file is missing or damaged, or belongs to another model.
    """
    try:
        fields = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if CHECKSUM in fields and fields.pop(CHECKSUM) != _checksum({}, fields):
            raise ValueError(f"state.json: {_MISMATCH}")
        state = TrainState(**{"draws": None, **fields})
        is_sharded = (path / LIST).is_file()
        tensors = {} if is_sharded else read_tensors(path / "optimizer.safetensors")
    except (OSError, UserError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); delete it to continue from the one before") from None
    if is_sharded:
        _load_shards(path, model, ema, optimizer, ranks or Ranks(1))
        return state
    load_weights(model, path / "model.safetensors")
    with torch.no_grad():
        for name, value in read_tensors(path / "ema.safetensors").items():
            if name in ema:
                ema[name].copy_(sharded_like(value, ema[name]))
    parameters = dict(model.named_parameters())
    _load_optimizer(
        model,
        optimizer,
        {
            key: sharded_like(value, parameters[name])
            for key, value in tensors.items()
            if (name := key.split("/", 1)[1]) in parameters
        },
    )
    return state


def _load_shards(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Load the tensors of a sharded checkpoint in place. A collective."""
    weights, parameters = model.state_dict(), dict(model.named_parameters())
    names = ["model", "ema", "optimizer"]
    verify_shards(path, names, ranks)
    saved = {name: shapes(path / name) for name in names}
    with ranks.together():
        known = {name for name in saved["model"] if name in weights or not name.startswith("projector.")}
        wrong = [n for n in sorted(known | {*weights}) if n not in weights or saved["model"].get(n) != weights[n].shape]
        if wrong:
            reason = ", ".join(wrong[:3])
            raise UserError(f"{path}: these weights belong to another model than the settings describe ({reason})")
    fill_from_shards(path / "model", weights, ranks)
    fill_from_shards(path / "ema", {name: value for name, value in ema.items() if name in saved["ema"]}, ranks)
    tensors = {}
    for key, size in saved["optimizer"].items():
        parameter = parameters.get(key.split("/", 1)[1])
        if parameter is not None:
            tensors[key] = torch.empty_like(parameter) if size == parameter.shape else torch.empty(size)
    fill_from_shards(path / "optimizer", tensors, ranks)
    _load_optimizer(model, optimizer, tensors)


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load tensors with the names of :func:`_optimizer_tensors`."""
    per_parameter = {}
    for index, (name, _) in enumerate(model.named_parameters()):
        fields = {key.split("/", 1)[0]: value for key, value in tensors.items() if key.split("/", 1)[1] == name}
        if fields:
            per_parameter[index] = fields
    optimizer.load_state_dict({"state": per_parameter, "param_groups": optimizer.state_dict()["param_groups"]})


def save_weights(path: Path, model: nn.Module, **facts: Any) -> None:
    """Write the weights of ``model`` to one file, with ``facts`` in its header."""
    tensors = _plain(model.state_dict())
    try:
        with replacing(path) as temporary:
            _write(temporary, tensors, {key: str(value) for key, value in facts.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}); free disk space. An earlier file is unchanged") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, or of a folder of a sharded checkpoint, and verify checksums where there are any.

    Raises:
        UserError: the file is missing or damaged.
    """
    if path.is_dir():
        return read_shards(path)
    try:
        tensors, facts = load_file(path), _header(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    if CHECKSUM in facts and facts.pop(CHECKSUM) != _checksum(tensors, facts):
        raise UserError(f"{path}: damaged, {_MISMATCH}; use another checkpoint")
    return tensors


def read_facts(path: Path) -> dict[str, str]:
    """Read the header facts that :func:`save_weights` wrote."""
    return {key: value for key, value in _header(path).items() if key != CHECKSUM}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file, or a folder of a sharded checkpoint, into ``model``.

    Raises:
        UserError: the names or shapes belong to another model.
    """
    expected = model.state_dict()
    tensors = {
        name: sharded_like(value, expected[name]) if name in expected else value
        for name, value in read_tensors(path).items()
        # The projector exists only in training with REPA.
        if name in expected or not name.startswith("projector.")
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: these weights belong to another model than the settings describe ({reason})"
        ) from None


def find_weights(run: Path, checkpoint: str = "latest", weights: str = "ema") -> Path:
    """Find the weight file of a run, or the folder with its shards.

    Args:
        run: folder written by training.
        checkpoint: ``"latest"``, ``"best"`` (highest validation mIoU, averaged weights), a step number, or the path of
            a checkpoint, a safetensors file or a folder with shards.
        weights: ``"ema"`` or ``"model"``.

    Raises:
        UserError: there is no such file; the message says what there is.
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
        return _weights_in(found[-1], weights)
    if checkpoint.isdigit():
        path = _weights_in(run / "checkpoints" / f"{PREFIX}{int(checkpoint):08d}", weights)
        if not path.exists():
            steps = ", ".join(str(int(found.name.removeprefix(PREFIX))) for found in list_checkpoints(run)) or "none"
            raise UserError(f"--checkpoint {checkpoint}: no such step in {run}; steps kept: {steps}")
        return path
    path = Path(checkpoint)
    if (path / "state.json").is_file():
        return _weights_in(path, weights)
    if not path.is_file() and not (path.is_dir() and (path.parent / LIST).is_file()):
        raise UserError(
            "--checkpoint must be latest, best, a step, a .safetensors file or the folder of a checkpoint, got "
            f"{checkpoint!r}"
        )
    return path


def weights_name(run: Path, path: Path) -> str:
    """Name weights of :func:`find_weights`: their place in the run, and their step if the place does not contain it."""
    name = str(path.relative_to(run)) if path.is_relative_to(run) else str(path)
    step = read_facts(path).get("step") if path.is_file() else None
    return f"{name}, step {step}" if step else name


def _weights_in(checkpoint: Path, weights: str) -> Path:
    return checkpoint / (weights if (checkpoint / LIST).is_file() else f"{weights}.safetensors")


def read_run_config(
    run: Path,
    pairs: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    *,
    checkpoint: str = "latest",
) -> Config:
    """Read the settings of a run, those of the checkpoint's stage if the run has several, and replace some.

    Args:
        run: folder written by training.
        pairs: strings like ``"sample.steps=5"``.
        flags: dotted keys to values; ``None`` values are skipped.
        checkpoint: the checkpoint that the settings are for, as in ``--checkpoint``.

    Raises:
        UserError: not a run folder, or a replaced setting would change what the network's outputs mean.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"run folder {run}: no config.yaml there; give a folder written by 'flowseg train --out'")
    config = load_config(run / "config.yaml")
    step = trained_steps(run, checkpoint)
    stage = config.at_step(config.train.steps if step is None else max(step - 1, 0))
    replaced = override(stage.model_dump(mode="json"), pairs, flags)
    check_meaning(config, replaced, run)
    return replaced


def trained_steps(run: Path, checkpoint: str = "latest") -> int | None:
    """The number of training steps of a checkpoint, or ``None`` if it is unknown."""
    if checkpoint.isdigit():
        return int(checkpoint)
    if checkpoint == "latest":
        return max((int(path.name.removeprefix(PREFIX)) for path in list_checkpoints(run)), default=None)
    path = run / "best.safetensors" if checkpoint == "best" else Path(checkpoint)
    for place in (path, path.parent):
        step = place.name.removeprefix(PREFIX)
        if step != place.name and step.isdigit():
            return int(step)
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
        return int(read_facts(path)["step"])
    return None


def check_meaning(before: Config, after: Config, run: Path) -> None:
    """Refuse settings that describe another network, or that change what its outputs mean (codes, prediction, source, loss).

    Raises:
        UserError: naming the setting.
    """
    keys = ["codes.channels", "codes.sequence", "flow.predicts", "flow.source", "loss.kind", "model.condition_on_image"]
    keys.append("model.head_features")
    if before.data.name == after.data.name:
        # The codes depend on the number of classes.
        keys.append("data.num_classes")
    # Equal sizes may be written in two ways, such as L and L/16.
    if resolve_size(before.model) != resolve_size(after.model):
        keys += ["model.size", *(f"model.{field.name}" for field in dataclasses.fields(ModelSize))]
    old, new = before.flat(), after.flat()
    for key in keys:
        if old[key] != new[key]:
            raise UserError(f"{key}: {run} was trained with {old[key]!r}, got {new[key]!r}; train another run for that")


_MISMATCH = "checksum mismatch"


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a safetensors file with ``facts`` and a checksum in its header, and flush it to the disk."""
    # save_file makes a file that only its owner can read. Give it the mode of any new file in this folder.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={**facts, CHECKSUM: _checksum(tensors, facts)})
    with contextlib.suppress(OSError):
        path.chmod(mode)
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
    """SHA-256 of the facts, and of the name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(tensors: dict[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Gather whole tensors on the host, a collective. ``keep=False`` keeps none: one copy in a machine's memory suffices."""
    gathered = ((name, whole(value.detach())) for name, value in tensors.items())
    return {name: value.cpu().contiguous() for name, value in gathered if keep}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {f"{field}/{names[index]}": value for index, fields in state.items() for field, value in fields.items()}
