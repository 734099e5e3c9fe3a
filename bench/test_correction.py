"""distance_correction and flow_loss against eager PyTorch, torch.compile and KeOps."""

import pytest
import torch

import flowseg_kernels as fk

from . import plain
from .conftest import DEVICE, NAMES, OURS, backend_of, peer, skip_unless_it_runs


def keops_correction(mu, eps):
    lazy = peer("pykeops.torch").LazyTensor
    codes = lazy(mu[None].contiguous())

    def run(x, labels):
        rows = x.movedim(1, -1).reshape(-1, 1, x.shape[1]).contiguous()
        diff = lazy(rows) - codes
        r = 1 / ((diff**2).sum(-1) + eps)
        total = r.sum(1)
        pull = ((r * r) * diff).sum(1)
        own = rows[:, 0] - mu[labels.flatten()]
        own = own / (own.square().sum(1, keepdim=True) + eps)
        return (2 * (own - pull / total)).view(*labels.shape, -1).movedim(-1, 1)

    return run


def correction_cost(work, bytes_a_channel=4):
    """Bytes moved, pairs of a pixel and a class, and operations of the multiply pipes.

    These for each pair: C for the distance, the start of the division (on a GPU the reciprocal's own Newton step), a square and
    C for the sums; a GPU's pipes also do the C subtractions and the sum.
    """
    c, pairs = work.channels, work.pixels * work.classes
    slots = 3 * c + 3 if DEVICE == "cuda" else 2 * c + 2
    return {
        "moved": work.pixels * (2 * c * bytes_a_channel + work.label_dtype.itemsize),
        "operations": 2 * pairs * slots,
        "pairs": pairs,
    }


def with_long_labels(work):
    for inputs in work.sets:
        inputs.setdefault("long", inputs["labels"].long())
        inputs.setdefault("bf16", inputs["x"].bfloat16())
    return work


def assert_corrects(run, entry, work):
    """The entry agrees with plain PyTorch in fp64 on the first and the last rows."""
    inputs = work.sets[0]
    height = inputs["x"].shape[2]
    ends = min(height // 2, max(1, min(32, 2**16 // work.classes) // 2))
    rows = [*range(ends), *range(height - ends, height)]
    bf16 = "bf16" in entry
    x = inputs["bf16" if bf16 else "x"][:1, :, rows]
    mu = work.codebook.centroids.double()
    want = plain.correction(x.double(), inputs["long"][:1, rows], mu, work.codebook.default_eps)
    with backend_of(entry):
        got = run(inputs)[:1, :, rows].double()
    scale = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-2 if bf16 else 1e-4, atol=(5e-3 if bf16 else 1e-5) * max(scale, 1.0))


def correction_entry(entry, work):
    """The function of the inputs that an entry times."""
    mu, eps = work.codebook.centroids, work.codebook.default_eps
    if entry in OURS:
        return lambda i: fk.distance_correction(i["x"], i["labels"], work.codebook)
    if entry.endswith("bf16"):
        return lambda i: fk.distance_correction(i["bf16"], i["labels"], work.codebook)
    if entry == "eager":
        return lambda i: plain.correction(i["x"], i["long"], mu, eps)
    if entry == "torch.compile":
        compiled = torch.compile(plain.correction, dynamic=False)
        return lambda i: compiled(i["x"], i["long"], mu, eps)
    formula = keops_correction(mu, eps)
    return lambda i: formula(i["x"], i["long"])


@pytest.mark.parametrize("entry", [*OURS, *(f"{o} bf16" for o in OURS), "eager", "torch.compile", "KeOps"])
@pytest.mark.parametrize("workload", NAMES)
def test_distance_correction(workloads, measure, workload, entry):
    skip_unless_it_runs(entry, "distance_correction")
    if workload == "many" and entry in ("eager", "torch.compile"):
        pytest.skip("plain PyTorch would hold several GB at K = 1000")
    if workload == "ade512 random" and entry in ("torch.compile", "KeOps"):
        pytest.skip("does not depend on where the labels lie")
    work = with_long_labels(workloads(workload))
    run = correction_entry(entry, work)
    assert_corrects(run, entry, work)
    cost = correction_cost(work, 2 if "bf16" in entry else 4) if entry.startswith("ours") else {}
    measure(run, work, "distance_correction", entry, **cost)


@pytest.mark.parametrize("entry", [*OURS, "eager", "torch.compile"])
@pytest.mark.parametrize("workload", NAMES)
def test_flow_loss_forward_and_backward(workloads, measure, workload, entry):
    skip_unless_it_runs(entry)
    if entry not in OURS and workload != "ade512":
        pytest.skip(
            "grows with the classes as the correction does, and takes long to compile; at K = 1000 it would hold several GB"
        )
    work = with_long_labels(workloads(workload))
    mu, eps = work.codebook.centroids, work.codebook.default_eps
    # Only where it is used: it imports the compiler, which takes seconds.
    formula = torch.compile(plain.loss, dynamic=False) if entry == "torch.compile" else plain.loss

    def run(i):
        leaf = i["x"].detach().requires_grad_()
        if entry in OURS:
            value = fk.flow_loss(leaf, i["source"], i["labels"], i["t"], work.codebook)
        else:
            value = formula(leaf, i["source"], i["long"], i["t"], mu, eps)
        value.backward()
        return value.detach(), leaf.grad

    few = {key: value[:1] for key, value in work.sets[0].items()}
    leaf = few["x"].double().requires_grad_()
    with fk.use_backend("reference"):
        want = fk.flow_loss(leaf, few["source"].double(), few["labels"], few["t"], work.codebook)
        want.backward()
    with backend_of(entry):
        value, gradient = run(few)
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))
    del leaf, want, gradient
    cost = correction_cost(work)
    # Prediction and source in, residual out, which is the gradient.
    cost["moved"] = work.pixels * (3 * 4 * work.channels + work.label_dtype.itemsize)
    measure(run, work, "flow_loss forward+backward", entry, **(cost if entry in OURS else {}))


@pytest.mark.parametrize("entry", [*OURS, "eager", "torch.compile"])
@pytest.mark.parametrize("workload", NAMES)
def test_flow_interpolate(workloads, measure, workload, entry):
    skip_unless_it_runs(entry, "flow_interpolate")
    work = with_long_labels(workloads(workload))
    mu = work.codebook.centroids
    formula = torch.compile(plain.interpolate, dynamic=False) if entry == "torch.compile" else plain.interpolate

    def run(i):
        if entry in OURS:
            return fk.flow_interpolate(i["source"], i["labels"], i["t"], work.codebook)
        return formula(i["source"], i["long"], i["t"], mu)

    i = work.sets[0]
    with backend_of(entry):
        torch.testing.assert_close(run(i), plain.interpolate(i["source"], i["long"], i["t"], mu))
    moved = work.pixels * (24 + work.label_dtype.itemsize) if entry in OURS else 0
    measure(run, work, "flow_interpolate", entry, moved=moved)
