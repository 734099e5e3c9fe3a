"""Ops and modules on a device on which a read-back is an error. test_no_read_back.py runs this file in a process of its own."""

import copy

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.backend import backend_reasons
from tests.conftest import ops_that_ran
from tests.support import pretend_device
from tests.support.neural_field import field_inputs
from tests.support.pretend_device import ReadBack, no_read_back, recorded


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
    "class_probabilities": lambda codes, image, source, labels, t: fk.class_probabilities(image, codes),
    "top_classes": lambda codes, image, source, labels, t: fk.top_classes(image, codes, 5, transform="neg_sq"),
}


def repeatedly(run):
    """The values of a call that may not read. They equal those of the first call, which may."""
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
    found = repeatedly(lambda: CALLS[name](codes, **{k: v.detach().clone() for k, v in inputs.items()}))
    if device.type != "cuda":
        expected = torch.utils._pytree.tree_leaves(CALLS[name](codebook, **host))
        assert all(torch.equal(old, new) for old, new in zip(expected, found, strict=True))


def test_the_host_code_of_cuda_ran(device):
    names = ("flow_interpolate", "flow_loss", "distance_correction", "nearest_centroid", "decode_confusion")
    names += ("class_probabilities", "top_classes")
    assert all(ops_that_ran[name, "cuda"] for name in names)


def test_the_field_does_not_read(device):
    fields = ("neural_field", "neural_field_bwd")
    if device.type == "cuda" and backend_reasons(fields[0], "cuda")["cuda"]:
        pytest.skip("the field has no CUDA kernel for this GPU")
    before = [ops_that_ran[name, "cuda"] for name in fields]
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [v.detach().to(device).requires_grad_() for v in field_inputs(dtype=dtype)]

        def run(leaves=leaves):
            out = fk.neural_field(*leaves, patch_size=4)
            return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

        repeatedly(run)
        # The kernels take the four calls in bf16 only.
        assert [ops_that_ran[name, "cuda"] for name in fields] == [calls + 4 for calls in before]


def test_codes_in_float64_and_images_in_bfloat16_do_not_read(device):
    inputs = tensors(device, 3)
    exact = fk.Codebook(fk.kronecker_centroids(19, 3).double()).to(device)
    image, labels = inputs["image"].bfloat16(), inputs["labels"]
    repeatedly(lambda: (fk.nearest_centroid(image, exact), fk.distance_correction(image, labels, exact)))


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
    repeatedly(run)


def test_a_codebook_made_in_inference_mode_does_not_read(device):
    image = tensors(device, 3)["image"]
    with torch.inference_mode():
        codes = fk.Codebook(fk.kronecker_centroids(19, 3)).to(device)
        repeatedly(lambda: fk.nearest_centroid(image, codes))
    image.requires_grad_()
    fk.flow_loss(image, image.detach(), *(tensors(device, 3)[name] for name in ("labels", "t")), codes).backward()


def test_codes_rounded_by_a_cast_do_not_read(device):
    codes = fk.Codebook(fk.kronecker_centroids(19, 3)).to(device)
    image = tensors(device, 3)["image"]
    exact = fk.nearest_centroid(image, codes)
    codes.centroids = codes.centroids.bfloat16()
    found = repeatedly(lambda: fk.nearest_centroid(image, codes))
    assert torch.equal(found[0], exact.cpu())


def waits(x, host):
    """Every kind of wait that the pretended device knows."""
    return {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.sum() > 0),
        "float": lambda: float(x.sum()),
        "index": lambda: range(9)[x.sum().long()],
        "tolist": lambda: x.tolist(),
        "repr": lambda: repr(x),
        "equal": lambda: torch.equal(x, x),
        "allclose": lambda: torch.allclose(x, x),
        "cpu": lambda: x.cpu(),
        "to the host": lambda: x.to("cpu"),
        "to the device": lambda: host.to(x.device),
        "to the device, blocking": lambda: host.pin_memory().to(x.device),
        "to the device, not pinned": lambda: host.to(x.device, non_blocking=True),
        "copy_ to the device": lambda: x.copy_(host),
        "copy_ to the host": lambda: host.copy_(x),
        "tensor": lambda: torch.tensor(1.0, device=x.device),
        "as_tensor": lambda: torch.as_tensor([1.0, 2.0], device=x.device),
        "new_tensor": lambda: x.new_tensor([1.0]),
        "nonzero": lambda: (x > 0).nonzero(),
        "where": lambda: torch.where(x > 0),
        "masked_select": lambda: x.masked_select(x > 0),
        "a mask as index": lambda: x[x > 0],
        "a mask as place": lambda: x.__setitem__(x > 0, 0.0),
        "indices of the host": lambda: x[torch.tensor([0, 1])],
        "unique": lambda: x.unique(),
        "bincount": lambda: torch.bincount((x > 0).int().flatten()),
        "repeat_interleave": lambda: x.repeat_interleave((x[:, 0] > 0).long(), dim=0),
        "inverse": lambda: torch.linalg.inv(0 * x + torch.eye(4, device=x.device)),
        "clip_grad_norm_": lambda: torch.nn.utils.get_total_norm([x], error_if_nonfinite=True),
    }


def test_every_wait_is_refused_and_named(device):
    if device.type == "cuda":
        pytest.skip(
            "this lists the waits that the pretended device refuses; torch.cuda.set_sync_debug_mode sees some of them"
        )
    x, host = torch.rand(4, 4).to(device), torch.rand(4, 4)
    for name, wait in waits(x, host).items():
        wait()
        with (
            no_read_back(),
            pytest.raises(ReadBack, match=r"the host waits for the device: .*, at .*read_backs\.py:\d+"),
        ):
            wait()
            pytest.fail(name)


def test_work_of_the_device_is_not_refused(device):
    x, host = torch.rand(4, 4).to(device), torch.rand(4, 4)
    with no_read_back():
        moved = host.pin_memory().to(device, non_blocking=True)
        made = torch.full((4,), 2.0, device=device), torch.arange(4, device=device), torch.zeros((), device=device)
        x[:, 1] = 3.0
        x.masked_fill_(x > 2, 0.5).clamp_(max=1).remainder_(3)
        result = (x @ moved + made[0] * torch.tensor(0.5))[made[1]].softmax(-1)
        back = result.to("cpu", non_blocking=True)
        torch.nn.utils.get_total_norm([x, result])
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.allclose(back.sum(-1), torch.ones(4)) and torch.equal(moved.cpu(), host)


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
        pytest.skip("only the pretended device counts read-backs; torch.cuda.set_sync_debug_mode raises or warns")
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
