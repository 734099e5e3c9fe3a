"""Tests that need a GPU, on both GPU backends: CUDA graphs, streams, devices, and sizes beyond 2^31 elements.

The tests of the ops run on a GPU through the `backend` fixture.
"""

import functools

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.backend import backend_reasons, requested_backend

from ..conftest import REQUIRED, ran
from ..support.neural_field import dtype_for
from ..support.samples import image_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
OPS = (
    "flow_interpolate",
    "distance_correction",
    "flow_loss",
    "nearest_centroid",
    "decode_confusion",
    "class_probabilities",
    "top_classes",
)


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    """Run the test inside use_backend(name)."""
    for op in OPS:
        reason = backend_reasons(op, "cuda")[request.param]
        if reason:
            (pytest.fail if request.param in REQUIRED else pytest.skip)(f"{op}: {reason}")
    ran.add(request.param)
    with fk.use_backend(request.param):
        yield request.param


def inputs(device="cuda", **options):
    book = fk.Codebook(fk.kronecker_centroids(150, 3)).to(device)
    x, source, labels, t = image_batch(book.centroids.cpu(), **options)
    return book, x.to(device), source.to(device), labels.to(device), t.float().to(device)


def run_all(book, x, source, labels, t):
    """Every op, and the gradients of the loss and of the field: a tuple of tensors."""
    x = x.detach().requires_grad_()
    loss = fk.flow_loss(x, source, labels, t, book)
    (grad,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        return (
            loss.detach(),
            grad,
            fk.flow_interpolate(source, labels, t, book),
            fk.distance_correction(x, labels, book),
            fk.nearest_centroid(x, book),
            *fk.nearest_centroid(x, book, return_distance=True, return_margin=True),
            fk.decode_confusion(x, labels, book),
            fk.class_probabilities(x, book),
            *fk.top_classes(x, book, 5, temperature=0.5),
            *run_field(x, source),
        )


def run_field(x, source):
    """The neural field and the gradients of its input and weights; empty where the backend has no kernel of it for this GPU."""
    if backend_reasons("neural_field", "cuda")[requested_backend()]:
        return ()
    dtype = dtype_for(requested_backend())
    patch, hidden, blocks, ratio = 8, 16, 2, 2
    height, width = (size // patch * patch for size in x.shape[-2:])
    number = (height // patch) * (width // patch)
    pixels = x[..., :height, :width].to(dtype).detach().requires_grad_()
    count = blocks * 2 * ratio * hidden**2
    # Take the weights from the inputs: a replayed graph must not draw random numbers.
    weights = source.flatten(1).repeat(1, -(-number * count // source[0].numel()))[:, : number * count]
    weights = weights.reshape(-1, number, blocks, count // blocks).to(dtype).detach().requires_grad_()
    fixed = functools.partial(torch.full, dtype=dtype, device=x.device)
    with torch.enable_grad():
        out = fk.neural_field(
            pixels, weights, fixed((hidden, 3 + 64), 0.1), fixed((hidden,), 0.1), fixed((blocks, hidden), 1.0),
            fixed((hidden,), 1.0), fixed((3, hidden), 0.1), fixed((3,), 0.0), patch_size=patch, mlp_ratio=ratio,
        )  # fmt: skip
        return out.detach(), *torch.autograd.grad(out.square().sum(), (pixels, weights))


def assert_same(got, want):
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_capture_and_replay_in_a_cuda_graph(gpu):
    book, *first = inputs()
    _, *second = inputs()
    static = [v.clone() for v in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_all(book, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_all(book, *static)
    for values in (first, second, first):
        for place, value in zip(static, values):
            place.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, run_all(book, *values))


def test_the_current_stream_is_used(gpu):
    """Keep a stream busy: work on any other stream would read the inputs before they are written."""
    book, *values = inputs(height=64, width=64)
    want = run_all(book, *values)
    stream = torch.cuda.Stream()
    places = [torch.zeros_like(v) for v in values]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for place, value in zip(places, values):
            place.copy_(value)
        got = run_all(book, *places)
    stream.synchronize()
    assert_same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_of_another_than_the_current_device(gpu):
    book, *values = inputs("cuda:1")
    torch.cuda.set_device(0)
    got = run_all(book, *values)
    assert torch.cuda.current_device() == 0 and all(v.device == torch.device("cuda", 1) for v in got)
    with torch.cuda.device(1):
        assert_same(got, run_all(book, *values))


def test_labels_out_of_range_count_as_ignored(gpu):
    book, x, source, labels, t = inputs()
    wrong = torch.where(labels == 255, 10**6, labels)
    wrong[0, 0, 0] = -7
    right = torch.where(wrong == -7, 255, labels)
    assert_same(run_all(book, x, source, wrong, t), run_all(book, x, source, right, t))


def skip_without(needed):
    """Skip the test if the GPU has too little memory for its tensors of `needed` bytes."""
    if torch.cuda.mem_get_info()[0] < 1.3 * needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed")


def test_more_than_two_to_the_31_elements(gpu):
    """More than 2^31 elements, so that offsets in the last channel need 64 bits. Both ends are compared with small calls."""
    rows, columns = 27_000, 27_000  # 3 planes of 729 million
    needed = rows * columns * (3 * 2 * 2 + 2)
    skip_without(needed)
    book = fk.Codebook(fk.kronecker_centroids(20, 3)).cuda()
    x = torch.empty(1, 3, rows, columns, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1)
    assert x.numel() > 2**31
    labels = torch.randint(0, 20, (1, rows, columns), dtype=torch.uint8, device="cuda")
    ends = slice(0, 8), slice(rows - 8, rows)
    t = torch.full((1,), 0.25, device="cuda")
    interpolated = fk.flow_interpolate(x, labels, t, book)
    for part in ends:
        assert torch.equal(interpolated[:, :, part], fk.flow_interpolate(x[:, :, part], labels[:, part], t, book))
    del interpolated
    decoded = fk.nearest_centroid(x, book, out_dtype=torch.uint8)
    corrected = fk.distance_correction(x, labels, book)
    for part in ends:
        assert torch.equal(decoded[:, part], fk.nearest_centroid(x[:, :, part], book, out_dtype=torch.uint8))
        assert torch.equal(corrected[:, :, part], fk.distance_correction(x[:, :, part], labels[:, part], book))
    del corrected
    assert fk.decode_confusion(x, decoded, book).diagonal().sum() == rows * columns


@pytest.mark.parametrize("predicts", ["velocity", "endpoint"])
def test_loss_and_gradient_beyond_two_to_the_31_elements(gpu, predicts):
    """Both ends are compared with small calls. The reduction is a sum: its gradient does not depend on the size of the call."""
    rows, columns = 27_000, 27_000
    # Prediction, source, residual and gradient in bf16, and labels.
    needed = rows * columns * (4 * 3 * 2 + 1)
    skip_without(needed)
    book = fk.Codebook(fk.kronecker_centroids(20, 3)).cuda()
    x, source = (
        torch.empty(1, 3, rows, columns, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1) for _ in range(2)
    )
    assert x.numel() > 2**31
    labels = torch.randint(0, 20, (1, rows, columns), dtype=torch.uint8, device="cuda")
    t = torch.full((1,), 0.25, device="cuda")

    def sum_and_gradient(part):
        leaf = x[:, :, part].detach().requires_grad_()
        loss = fk.flow_loss(leaf, source[:, :, part], labels[:, part], t, book, predicts=predicts, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    whole, gradient = sum_and_gradient(slice(0, rows))
    for part in (slice(0, 8), slice(rows - 8, rows)):
        assert torch.equal(gradient[:, :, part], sum_and_gradient(part)[1])
    del gradient
    parts = sum(sum_and_gradient(slice(i, i + 3_000))[0].double() for i in range(0, rows, 3_000))
    torch.testing.assert_close(whole.double(), parts, rtol=1e-6, atol=0)


def test_the_field_beyond_two_to_the_31_elements(gpu):
    """Pixels and generated weights have more than 2^31 elements each. Both ends are compared with small calls."""
    if reason := backend_reasons("neural_field", "cuda")[gpu]:
        pytest.skip(reason)
    rows, columns, patch, hidden = 27_000, 27_000, 8, 16
    patches, count = rows // patch * (columns // patch), 2 * hidden**2
    # In bf16: weights and their gradient; pixels, output, and the gradients of both.
    needed = 2 * (2 * patches * count + 4 * 3 * rows * columns)
    skip_without(needed)
    random = functools.partial(torch.empty, dtype=torch.bfloat16, device="cuda")
    x = random(1, 3, rows, columns).uniform_(-1, 1)
    weights = random(1, patches, 1, count).uniform_(-1, 1)
    assert x.numel() > 2**31 and weights.numel() > 2**31
    shapes = (hidden, 3 + 64), (hidden,), (1, hidden), (hidden,), (3, hidden), (3,)
    shared = [random(shape).uniform_(-1, 1) for shape in shapes]

    def run(part, numbers):
        leaves = [v.detach().requires_grad_() for v in (x[:, :, part], weights[:, numbers])]
        out = fk.neural_field(*leaves, *shared, patch_size=patch, mlp_ratio=1)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    line = columns // patch  # patches per row of patches
    out, of_x, of_weights = run(slice(0, rows), slice(0, patches))
    for part, numbers in ((slice(0, 8), slice(0, line)), (slice(rows - 8, rows), slice(patches - line, patches))):
        assert_same((out[:, :, part], of_x[:, :, part], of_weights[:, numbers]), run(part, numbers))
