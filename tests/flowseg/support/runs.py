"""The files of a run, as tests compare them."""

import json

import torch
from safetensors.torch import load_file

from flowseg.checkpoint import list_checkpoints

TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def metrics(run, event=None):
    """All lines of ``metrics.jsonl``, or those of one event."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def steps(run, event="train"):
    """The steps of the lines of one event."""
    return [line["step"] for line in metrics(run, event)]


def checkpoint_names(run):
    """Names of the complete checkpoints, oldest first."""
    return [path.name for path in list_checkpoints(run)]


def assert_same_weights(first, second):
    """The newest checkpoints of two runs hold the same weights, averaged weights and optimiser state, bit for bit."""
    first, second = list_checkpoints(first)[-1], list_checkpoints(second)[-1]
    for name in TENSOR_FILES:
        ours, theirs = load_file(first / name), load_file(second / name)
        assert ours.keys() == theirs.keys(), name
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), (name, key)
