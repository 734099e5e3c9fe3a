"""distance_correction and flow_loss against eager PyTorch, torch.compile and KeOps."""

import pytest
import torch

import flowseg_kernels as fk

from . import plain
from .conftest import peer


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


@pytest.mark.parametrize("workload", ["ade512", "coco512", "many"])
@pytest.mark.parametrize("entry", ["ours", "ours bf16", "eager", "torch.compile", "KeOps"])
def test_distance_correction(workloads, measure, workload, entry):
    work = workloads(workload)
    if workload == "many" and entry in ("eager", "torch.compile"):
        pytest.skip("plain PyTorch would hold several GB at K = 1000")
    mu, eps = work.codebook.centroids, work.codebook.default_eps
    for inputs in work.sets:
        inputs.setdefault("long", inputs["labels"].long())
        inputs.setdefault("bf16", inputs["x"].bfloat16())
    run = {
        "ours": lambda: lambda i: fk.distance_correction(i["x"], i["labels"], work.codebook),
        "ours bf16": lambda: lambda i: fk.distance_correction(i["bf16"], i["labels"], work.codebook),
        "eager": lambda: lambda i: plain.correction(i["x"], i["long"], mu, eps),
        "torch.compile": lambda: _compiled(plain.correction, mu, eps),
        "KeOps": lambda: (lambda f: lambda i: f(i["x"], i["long"]))(keops_correction(mu, eps)),
    }[entry]()
    inputs = work.sets[0]
    rows = slice(0, 32)
    x = inputs["bf16" if entry == "ours bf16" else "x"]
    want = plain.correction(x[:, :, rows].double(), inputs["long"][:, rows], mu.double(), eps)
    torch.testing.assert_close(
        run(inputs)[:, :, rows].double(), want, rtol=1e-2, atol=0.1 if entry == "ours bf16" else 2e-4
    )
    measure(run, work, "distance_correction", entry)


def _compiled(function, mu, eps):
    compiled = torch.compile(function, dynamic=False)
    return lambda i: compiled(i["x"], i["long"], mu, eps)


@pytest.mark.parametrize("entry", ["ours", "eager", "torch.compile"])
def test_flow_loss_forward_and_backward(workloads, measure, entry):
    work = workloads("ade512")
    mu, eps = work.codebook.centroids, work.codebook.default_eps
    compiled = torch.compile(plain.loss, dynamic=False)

    def run(i):
        leaf = i["x"].detach().requires_grad_()
        if entry == "ours":
            value = fk.flow_loss(leaf, i["source"], i["labels"], i["t"], work.codebook)
        else:
            value = (plain.loss if entry == "eager" else compiled)(leaf, i["source"], i["long"], i["t"], mu, eps)
        value.backward()
        return value.detach(), leaf.grad

    for inputs in work.sets:
        inputs.setdefault("long", inputs["labels"].long())
    inputs = work.sets[0]
    want = fk.flow_loss(inputs["x"].double(), inputs["source"].double(), inputs["labels"], inputs["t"], work.codebook)
    torch.testing.assert_close(run(inputs)[0].double(), want, rtol=1e-4, atol=0)
    measure(run, work, "flow_loss forward+backward", entry)
