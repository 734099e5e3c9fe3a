"""Activation checkpointing and hooks on saved tensors: the results are the same, and backward reads each saved tensor once."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flowseg_kernels as fk

from .steps import EveryOp, batch, called


def gradients(step, loss):
    return torch.autograd.grad(loss, list(step.parameters()))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_checkpointed_step_gives_the_same_gradients(backend, codes19, reentrant, patch_chunk):
    step = EveryOp(codes19, patch_chunk=patch_chunk)
    source, labels, t = batch(codes19)
    source.requires_grad_()
    want = step(source, labels, t)[0]
    got = checkpoint(lambda s: step(s, labels, t)[0], source, use_reentrant=reentrant)
    assert torch.equal(got, want)
    grads = []
    for loss in (want, got):
        step.zero_grad()
        source.grad = None
        loss.backward()
        grads.append([source.grad, *(p.grad.clone() for p in step.parameters())])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_recomputation_outside_of_the_block_gives_the_same_gradients(codes19, patch_chunk):
    """Backward and the second forward may run after the block, on the automatic backend: the same up to rounding."""
    if "cpu" not in fk.available_backends("flow_loss"):
        pytest.skip("needs two backends")
    step = EveryOp(codes19, patch_chunk=patch_chunk)
    inputs = batch(codes19)
    with fk.use_backend("reference"):
        loss = checkpoint(lambda *v: step(*v)[0], *inputs, use_reentrant=False)
    want = gradients(step, step(*inputs)[0])
    for a, b in zip(gradients(step, loss), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_selective_checkpointing_keeps_what_it_is_told(codes19, monkeypatch, patch_chunk):
    """The result of the expensive op is saved, and the cheap ops run again."""
    kept = {torch.ops.flowseg.neural_field.default}

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    step = EveryOp(codes19, patch_chunk=patch_chunk)
    inputs = batch(codes19)
    calls = called(monkeypatch)
    want = gradients(step, step(*inputs)[0])
    chunks = calls.count("neural_field")
    calls.clear()
    loss = checkpoint(
        lambda *v: step(*v)[0],
        *inputs,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    for a, b in zip(gradients(step, loss), want):
        assert torch.equal(a, b)
    assert calls.count("neural_field") == chunks == (1 if patch_chunk is None else 4)
    assert calls.count("flow_loss") == 2


class ReadOnce:
    """A saved tensor that may be read once only, as under non-reentrant checkpointing."""

    def __init__(self, tensor):
        self.tensor = tensor

    def read(self):
        assert self.tensor is not None, "a saved tensor was read twice"
        tensor, self.tensor = self.tensor, None
        return tensor


def once_only():
    return torch.autograd.graph.saved_tensors_hooks(ReadOnce, ReadOnce.read)


@pytest.mark.parametrize("hooks", [once_only, torch.autograd.graph.save_on_cpu], ids=["once", "save_on_cpu"])
def test_hooks_on_saved_tensors(backend, codes19, patch_chunk, hooks):
    """The compared gradients include those of time and source, from the backward of flow_interpolate."""
    step = EveryOp(codes19, patch_chunk=patch_chunk)
    source, labels, t = batch(codes19)
    wanted = [source.requires_grad_(), t.requires_grad_(), *step.parameters()]
    want = torch.autograd.grad(step(source, labels, t)[0], wanted)
    with hooks():
        loss = step(source, labels, t)[0]
    for a, b in zip(torch.autograd.grad(loss, wanted), want):
        assert torch.equal(a, b)
