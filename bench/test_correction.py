"""distance_correction, flow_loss and flow_interpolate against eager PyTorch, torch.compile and KeOps."""

import pytest
import torch

import flowseg_kernels as fk

from . import plain
from .cases.availability import skip_unless_it_runs
from .cases.correction import assert_corrects, correction_cost, correction_entry
from .cases.workloads import NAMES, with_converted_inputs
from .settings import OURS, backend_of


@pytest.mark.parametrize("entry", [*OURS, *(f"{o} bf16" for o in OURS), "eager", "torch.compile", "KeOps"])
@pytest.mark.parametrize("workload", NAMES)
def test_distance_correction(workloads, measure, workload, entry):
    skip_unless_it_runs(entry, "distance_correction")
    if workload == "many" and entry in ("eager", "torch.compile"):
        pytest.skip("plain PyTorch would take several GB at K = 1000")
    if workload == "ade512 random" and entry in ("torch.compile", "KeOps"):
        pytest.skip("the time does not depend on the label map")
    work = with_converted_inputs(workloads(workload))
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
            "its time grows with the classes like the correction's, and compiling is slow; K = 1000 would take several GB"
        )
    work = with_converted_inputs(workloads(workload))
    mu, eps = work.codebook.centroids, work.codebook.default_eps
    # Called for its own entry only, because it imports the compiler, which takes seconds.
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
    # The op reads prediction and source, and writes the residual, which is the gradient.
    cost["moved"] = work.pixels * (3 * 4 * work.channels + work.label_dtype.itemsize)
    measure(run, work, "flow_loss forward+backward", entry, **(cost if entry in OURS else {}))


@pytest.mark.parametrize("entry", [*OURS, "eager", "torch.compile"])
@pytest.mark.parametrize("workload", NAMES)
def test_flow_interpolate(workloads, measure, workload, entry):
    skip_unless_it_runs(entry, "flow_interpolate")
    work = with_converted_inputs(workloads(workload))
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
