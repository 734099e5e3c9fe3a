"""Ops and modules on a device on which a read-back is an error. test_no_read_back.py runs this file in a process of its own."""

import copy

import pytest
import torch

import flowseg_kernels as fk
from tests.conftest import ops_that_ran
from tests.support import pretend_device
from tests.support.pretend_device import no_read_back, recorded


@pytest.fixture(scope="session")
def device():
    return pretend_device.chosen_device()


def tensors(device, channels, classes=19):
    labels = torch.randint(0, classes, (2, 8, 16))
    labels[:, 0] = 255
    image = torch.rand(2, channels, 8, 16)
    made = {"image": image, "source": torch.rand_like(image), "labels": labels.to(torch.uint8), "t": torch.rand(2)}
    return {name: value.to(device) for name, value in made.items()}


def loss(codes, image, source, labels, t, **options):
    fk.flow_loss(image.requires_grad_(), source, labels, t, codes, **options).sum().backward()
    return image.grad


def interpolate(codes, image, source, labels, t):
    fk.flow_interpolate(image.requires_grad_(), labels, t.requires_grad_(), codes).sum().backward()
    return image.grad, t.grad


CALLS = {
    "encode_labels": lambda codes, image, source, labels, t: fk.encode_labels(labels, codes),
    "flow_interpolate": interpolate,
    "distance_correction": lambda codes, image, source, labels, t: fk.distance_correction(image, labels, codes),
    "flow_loss": loss,
    "flow_loss, sum": lambda codes, **inputs: loss(codes, **inputs, reduction="sum", predicts="endpoint"),
    "flow_loss, none": lambda codes, **inputs: loss(codes, **inputs, reduction="none", max_norm=2.0),
    "flow_loss, vanilla": lambda codes, **inputs: loss(codes, **inputs, correction_weight=0.0),
    "flow_loss, scheduled": lambda codes, **inputs: loss(codes, **inputs, correction_weight=torch.tensor(0.5)),
    "nearest_centroid": lambda codes, image, source, labels, t: fk.nearest_centroid(
        image, codes, return_distance=True, return_margin=True
    ),
    "decode_confusion": lambda codes, image, source, labels, t: fk.decode_confusion(image, labels, codes),
}


def repeatedly(run, device):
    """The result of a first call, which may read, and of three that may not."""
    first = run()
    with no_read_back():
        again = [run() for _ in range(3)][-1]
    flat = [value for value in torch.utils._pytree.tree_leaves(again) if isinstance(value, torch.Tensor)]
    for old, new in zip(torch.utils._pytree.tree_leaves(first), flat, strict=True):
        assert torch.equal(old.cpu(), new.cpu())
    return [value.cpu() for value in flat]


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("name", CALLS)
def test_ops_do_not_read(device, name, channels):
    inputs = tensors(device, channels)
    host = {key: value.cpu() for key, value in inputs.items()}
    codebook = fk.Codebook(fk.kronecker_centroids(19, channels))
    codes = copy.deepcopy(codebook).to(device)
    found = repeatedly(lambda: CALLS[name](codes, **{k: v.detach().clone() for k, v in inputs.items()}), device)
    if device.type != "cuda":
        expected = torch.utils._pytree.tree_leaves(CALLS[name](codebook, **host))
        assert all(torch.equal(old, new) for old, new in zip(expected, found, strict=True))


def test_the_host_code_of_cuda_ran(device):
    names = ("flow_interpolate", "flow_loss", "distance_correction", "nearest_centroid", "decode_confusion")
    assert {(name, "cuda") for name in names} <= ops_that_ran


def test_codes_in_float64_and_images_in_bfloat16_do_not_read(device):
    inputs = tensors(device, 3)
    exact = fk.Codebook(fk.kronecker_centroids(19, 3).double()).to(device)
    image, labels = inputs["image"].bfloat16(), inputs["labels"]
    repeatedly(lambda: (fk.nearest_centroid(image, exact), fk.distance_correction(image, labels, exact)), device)


def test_bare_codes_do_not_read(device):
    inputs = tensors(device, 3)
    codes = fk.kronecker_centroids(19, 3).to(device)
    image, labels = inputs["image"], inputs["labels"]
    run = lambda: (  # noqa: E731
        fk.encode_labels(labels, codes),
        fk.nearest_centroid(image, codes),
        fk.distance_correction(image, labels, codes, eps=0.1),
        fk.flow_loss(image, inputs["source"], labels, inputs["t"], codes, eps=0.1),
    )
    repeatedly(run, device)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        codebook = fk.Codebook(fk.kronecker_centroids(19, 3))
        self.layer = torch.nn.Linear(16, 16)
        self.decoder = fk.NeuralFieldDecoder(16, channels=3, hidden=8, depth=2, patch_size=8)
        torch.nn.init.normal_(self.decoder.final_layer.linear.weight)
        self.loss, self.labels = fk.FlowLoss(codebook, schedule="annealed"), fk.CentroidDecoder(codebook)

    def forward(self, image, source, labels, t):
        features = self.layer(torch.ones(2, 2, 16, device=image.device))
        prediction = self.decoder(image, features)
        self.loss(prediction, source, labels, t).backward()
        return self.labels(prediction), self.layer.weight.grad


@pytest.mark.parametrize("chunk", [None, 1])
def test_modules_train_without_reading(device, chunk):
    network = Network().to(device)
    network.decoder.patch_chunk = chunk
    inputs = tensors(device, 3)
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    network(**inputs)
    with no_read_back():
        for _ in range(3):
            network(**inputs)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()


def test_written_codes_are_read_once_per_tensor(device):
    if device.type == "cuda":
        pytest.skip("only the pretended device counts read-backs")
    network, inputs = Network().to(device), tensors(device, 3)
    network(**inputs)
    codebook = network.loss.codebook
    with torch.no_grad():
        # DistributedDataParallel of torch 2.10 writes every buffer so in each forward.
        for buffer in (codebook.centroids, codebook.ignored):
            buffer.copy_(buffer.clone())
    with recorded() as reads:
        network(**inputs)
        assert len(reads) == 2 and all("flowseg_kernels/derived.py" in read for read in reads), reads
        network(**inputs)
        assert len(reads) == 2
