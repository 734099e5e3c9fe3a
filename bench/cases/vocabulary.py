"""One training step and one decoding of the last layer of a network, from 64 features per pixel, at up to 65,536 classes.

The head is a linear layer to K scores with cross-entropy and argmax: plain, compiled, and in chunks of pixels.
Ours is a linear layer to C code channels with flow_loss and nearest_centroid, with the stack's defaults: the layer predicts the end
point, the transform is neg_log, the temperature is 1.
"""

import itertools
import pathlib

import torch
import torch.nn.functional as F

import flowseg_kernels as fk

from ..settings import DEVICE, OURS, QUICK, SIZE, backend_of
from ..vocabulary import needed_bytes
from .decoding import smallest_distances, wrong_pixels
from .workloads import SQUARE, label_map, label_type

CLASSES = (150, 1000, 3000, 10_000, 65_536)
FEATURES = 64
#: Standard deviation of the predictions around their codes.
SPREAD = 0.05
#: The main entry of ours has 16 channels; "ours 8 channels" has the stack's default.
CHANNELS = (16, 8)
IN_CHUNKS, IN_CHUNKS_BF16 = "in chunks", "in chunks bf16"
ENTRIES = (*OURS, *(f"{o} 8 channels" for o in OURS), "eager", "torch.compile", IN_CHUNKS, IN_CHUNKS_BF16)
#: Scores of a chunk: 4 MiB on a CPU, which its caches hold.
CHUNK_SCORES = 2**27 if DEVICE == "cuda" else 2**20
#: Bytes that must stay free.
MARGIN = 2 * 2**30


class Vocabulary:
    """Rotating features and labels of one number of classes, and the layers.

    Each layer is trained perfectly except for noise: it maps the features to the code of the pixel's class plus noise of standard
    deviation SPREAD. The head's scores are 2 mu_k z - |mu_k|^2, whose argmax is the code nearest to z.
    """

    def __init__(self, classes):
        self.name, self.channels = f"K={classes}", CHANNELS[0]
        # The default eps of 65,536 codes takes seconds.
        classes = min(classes, 3000) if QUICK else classes
        self.classes, self.spread, self.pixels = classes, SPREAD, SIZE * SIZE
        generator = torch.Generator(DEVICE).manual_seed(0)
        basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator, device=DEVICE))[0]
        ignore = 255 if classes <= 255 else -1
        self.codebooks, self.layers, first = {}, {}, 0
        for channels in CHANNELS:
            codes = fk.kronecker_centroids(classes, channels)
            self.codebooks[channels] = fk.Codebook(codes, ignore_index=ignore).to(DEVICE)
            # Each layer reads its own directions of the features, so the layers do not disturb each other.
            # QR returns columns next to each other. Layers have rows next to each other, and autograd multiplies them faster.
            weight = basis[first : first + channels].clone(memory_format=torch.contiguous_format)
            self.layers[channels] = weight, torch.zeros(channels, device=DEVICE)
            first += channels
        mu = self.codebooks[CHANNELS[0]].centroids
        self.layers["head"] = 2 * mu @ self.layers[CHANNELS[0]][0], -mu.square().sum(1)
        self.label_dtype = label_type(classes)
        self.sets = [self._inputs(basis[first:], generator) for _ in range(2)]
        for parameter in itertools.chain(*self.layers.values()):
            parameter.requires_grad_()
            parameter.grad = torch.zeros_like(parameter)

    def _inputs(self, rest, generator):
        labels = label_map(self.classes, 1, SIZE, SQUARE, generator)
        features = torch.randn(self.pixels, len(rest), generator=generator, device=DEVICE) @ rest
        for channels, codebook in self.codebooks.items():
            points = codebook.encode(labels).movedim(1, -1).reshape(self.pixels, channels)
            noise = torch.randn(points.shape, generator=generator, device=DEVICE)
            features += (points + SPREAD * noise) @ self.layers[channels][0]
        # A step replaces the gradient of the step before, so that the peak memory leaves out the gradient that all entries need.
        features.requires_grad_()
        features.grad = torch.zeros_like(features)
        source = torch.rand(1, max(CHANNELS), SIZE, SIZE, generator=generator, device=DEVICE) * 2 - 1
        return {
            "features": features,
            "labels": labels.to(self.label_dtype),
            "long": labels.flatten(),
            "source": source,
            "t": torch.rand(1, generator=generator, device=DEVICE),
        }

    def rotate(self):
        return itertools.cycle(self.sets)

    def part(self):
        """Some pixels of the first image as an image of one row. On more of them the fp64 formula would take seconds."""
        inputs, count = self.sets[0], max(16, min(self.pixels, 2**20 // self.classes))
        features = inputs["features"].detach()[:count].clone().requires_grad_()
        few = {key: inputs[key].flatten(-2)[..., None, :count] for key in ("labels", "source")}
        return {**inputs, **few, "features": features, "long": inputs["long"][:count]}


def channels_of(entry):
    return 8 if "8 channels" in entry else CHANNELS[0]


def layer_of(entry, work):
    return work.layers[channels_of(entry) if entry.startswith("ours") else "head"]


def predict(inputs, layer):
    """The layer's output as an image (1, C, H, W) in the shape of the labels."""
    weight, bias = layer
    planes = torch.addmm(bias[:, None], weight, inputs["features"].t())
    return planes.view(1, len(weight), *inputs["labels"].shape[1:])


def head_loss(features, weight, bias, labels):
    return F.cross_entropy(F.linear(features, weight, bias), labels)


def head_labels(features, weight, bias):
    return F.linear(features, weight, bias).argmax(1)


def chunks_of(classes, pixels):
    """The ranges of pixels whose scores fit CHUNK_SCORES."""
    length = max(64, CHUNK_SCORES // classes)
    return [slice(first, first + length) for first in range(0, pixels, length)]


class ChunkedHead(torch.autograd.Function):
    """Linear layer and cross-entropy that hold the scores of one chunk of pixels at a time, as Liger's fused kernel does on a GPU.

    The forward also computes the gradients. `dtype` is that of the matrix products; the softmax is in fp32.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, labels, dtype):
        of_features, of_weight = torch.empty_like(features), torch.zeros_like(weight)
        of_bias, total = torch.zeros_like(bias), features.new_zeros(())
        low = weight.to(dtype)
        for part in chunks_of(len(weight), len(features)):
            rows, own = features[part].to(dtype), labels[part, None]
            scores = F.linear(rows, low).float().add_(bias)
            normaliser = scores.logsumexp(1, keepdim=True)
            total += (normaliser - scores.gather(1, own)).sum()
            scores.sub_(normaliser).exp_()
            scores.scatter_add_(1, own, scores.new_full(own.shape, -1.0))
            scores /= len(features)
            of_bias += scores.sum(0)
            scores = scores.to(dtype)
            of_features[part] = scores @ low
            of_weight += scores.t() @ rows
        ctx.gradients = of_features, of_weight, of_bias
        return total / len(features)

    @staticmethod
    def backward(ctx, incoming):
        # Without a second reference, autograd takes the arrays over instead of copying them.
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(incoming) for gradient in gradients), None, None


def training_step(entry, work):
    """A function of the inputs: loss, and gradients of the features and of both parameters of the layer."""
    layer = layer_of(entry, work)
    compiled = torch.compile(head_loss, dynamic=False) if entry == "torch.compile" else head_loss

    def loss(i):
        if entry.startswith("ours"):
            channels = channels_of(entry)
            prediction, source = predict(i, layer), i["source"][:, :channels]
            return fk.flow_loss(prediction, source, i["labels"], i["t"], work.codebooks[channels], predicts="endpoint")
        if entry in (IN_CHUNKS, IN_CHUNKS_BF16):
            dtype = torch.bfloat16 if "bf16" in entry else torch.float32
            return ChunkedHead.apply(i["features"], *layer, i["long"], dtype)
        return compiled(i["features"], *layer, i["long"])

    def run(i):
        leaves = i["features"], *layer
        for leaf in leaves:
            leaf.grad = None
        value = loss(i)
        value.backward()
        return value.detach(), *(leaf.grad for leaf in leaves)

    return run


def decoding(entry, work):
    """A function of the inputs: the class of each pixel."""
    layer = layer_of(entry, work)
    compiled = torch.compile(head_labels, dynamic=False) if entry == "torch.compile" else head_labels

    @torch.no_grad()
    def run(i):
        features = i["features"]
        if entry.startswith("ours"):
            codes = work.codebooks[channels_of(entry)]
            return fk.nearest_centroid(predict(i, layer), codes, out_dtype=work.label_dtype)
        if entry not in (IN_CHUNKS, IN_CHUNKS_BF16):
            return compiled(features, *layer)
        weight, bias = layer
        dtype = torch.bfloat16 if "bf16" in entry else torch.float32
        low, labels = weight.to(dtype), torch.empty(len(features), dtype=torch.int64, device=DEVICE)
        for part in chunks_of(len(weight), len(features)):
            labels[part] = F.linear(features[part].to(dtype), low).float().add_(bias).argmax(1)
        return labels

    return run


def free_bytes():
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def why_too_large(what, entry, classes, pixels, free):
    """The reason why an entry cannot run in `free` bytes; "" if it can."""
    needed = needed_bytes(what, entry, classes, pixels)
    if needed + MARGIN <= free:
        return ""
    return f"{needed:,} bytes of scores and gradients are needed; {max(0, free - MARGIN):,} are free"


def assert_trains(run, entry, work):
    """Loss and gradients equal the fp64 formula on some pixels."""
    part = work.part()
    layer = layer_of(entry, work)
    leaves = [v.detach().double().requires_grad_() for v in (part["features"], *layer)]
    if entry.startswith("ours"):
        prediction = predict({**part, "features": leaves[0]}, leaves[1:])
        codes = work.codebooks[channels_of(entry)]
        with fk.use_backend("reference"):
            source = part["source"][:, : prediction.shape[1]].double()
            want = fk.flow_loss(prediction, source, part["labels"], part["t"], codes, predicts="endpoint")
    else:
        want = head_loss(*leaves, part["long"])
    want.backward()
    with backend_of(entry):
        value, *gradients = run(part)
    allowed = 3e-2 if "bf16" in entry else 1e-4
    torch.testing.assert_close(value.double(), want.detach(), rtol=allowed, atol=0)
    for place, (got, leaf) in enumerate(zip(gradients, leaves)):
        error = float((got.double() - leaf.grad).norm() / leaf.grad.norm())
        assert error <= allowed, f"gradient {place}: {error}"


def assert_decodes(run, entry, work):
    """The number of pixels whose label names no nearest code (ours) or no largest score (the head), apart from rounding."""
    inputs = work.sets[0]
    with backend_of(entry):
        labels = run(inputs).flatten()
    with torch.no_grad():
        weight, bias = layer_of(entry, work)
        if entry.startswith("ours"):
            mu = work.codebooks[channels_of(entry)].centroids
            rows = predict(inputs, (weight, bias))[0].flatten(1).t()
            return wrong_pixels(labels, rows, mu, smallest_distances(rows, mu))
        features = work.part()["features"].double()
        scores = F.linear(features, weight.double(), bias.double())
        best, found = scores.max(1).values, scores.gather(1, labels[: len(features), None])[:, 0]
        return int((best - found > 1e-5 * scores.abs().max()).sum())
