"""Every op behaves as PyTorch expects: opcheck, compilation, autocast, errors for missing derivatives, unchanged inputs, memory."""

import copy
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch._dynamo.utils import counters

import flowseg_kernels as fk
from flowseg_kernels.runtime.backend import OPS

from ..support.neural_field import dtype_for, field_inputs
from ..support.samples import image_batch, layouts

OPS_ON_IMAGES = (
    "flow_interpolate",
    "distance_correction",
    "flow_loss",
    "nearest_centroid",
    "decode_confusion",
    "class_probabilities",
    "top_classes",
)


def op_arguments(name, codes, x, source, labels, t):
    """Arguments of torch.ops.flowseg.NAME for these inputs."""
    mu = codes.centroids.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return {
        "flow_interpolate": (source, labels, t, mu, codes.ignored, 0),
        "distance_correction": (x.detach(), labels, mu, 1.0, 0.01, "neg_log", None, None, 255, None),
        "flow_loss": (
            x, source.detach(), labels, t.detach(), mu, "velocity", "velocity", 1.0, "static", 1.0, None, "neg_log", None,
            codes.ignored, 0, "mean", 0.05, None, True,
        ),
        "nearest_centroid": (x.detach(), mu, True, "int64", True, True, codes.ignored, 0),
        "decode_confusion": (x.detach(), labels, mu, True, None, 255),
        "class_probabilities": (x.detach(), mu, 1.0, None, "neg_log", "probabilities", None),
        "top_classes": (x.detach(), mu, 3, 0.5, 0.01, "neg_sq", "int32", codes.ignored, 0, None),
    }[name]  # fmt: skip


def views(tensor):
    """Yield (name, view): contiguous, permuted, strided, offset, expanded and empty."""
    yield from layouts(tensor)
    yield "expanded", tensor[:1].expand(tensor.shape)
    yield "zero_size", tensor[:0]


LAYOUTS = [name for name, _ in views(torch.zeros(2, 3, 2, 2))]


@pytest.mark.many_forms(11)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", OPS_ON_IMAGES)
def test_opcheck(backend, name, dtype, layout, codes19):
    x, source, labels, t = image_batch(codes19.centroids, 2, 4, 5, dtype=dtype)
    x, source, labels = (dict(views(v))[layout] for v in (x, source, labels))
    t = t[: x.shape[0]]
    # opcheck compares gradients between modes with a small tolerance; the sum over an expanded leaf in half precision exceeds it.
    if layout != "expanded" or dtype.itemsize > 2:
        x, source, t = (v.detach().requires_grad_() for v in (x, source, t))
    torch.library.opcheck(getattr(torch.ops.flowseg, name).default, op_arguments(name, codes19, x, source, labels, t))


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["flow_interpolate_bwd", "flow_loss_bwd"])
def test_opcheck_of_backward_ops(backend, name, layout, codes19):
    x, source, labels, t = image_batch(codes19.centroids, 2, 4, 5)
    x, source, labels = (dict(views(v))[layout] for v in (x, source, labels))
    arguments = {
        "flow_interpolate_bwd": (x, source, labels, t[: x.shape[0]], codes19.centroids, None, 255, True, backend),
        "flow_loss_bwd": (torch.ones(()), x, torch.tensor(5), x, "mean", backend),
    }[name]
    torch.library.opcheck(getattr(torch.ops.flowseg, name).default, arguments)


@pytest.mark.parametrize("form", ["residual", "plain"])
@pytest.mark.parametrize("name", ["neural_field", "neural_field_bwd"])
def test_opcheck_of_the_field(backend, name, form):
    dtype = dtype_for(backend)
    field = [torch.empty(0, dtype=dtype) if v is None else v.detach() for v in field_inputs(dtype=dtype, form=form)]
    options = (4, 2, 1e-6, "first", form)
    arguments = {
        "neural_field": (*field, *options),
        "neural_field_bwd": (torch.randn_like(field[0]), *field, *options, [True, False] * 4, backend),
    }[name]
    torch.library.opcheck(getattr(torch.ops.flowseg, name).default, arguments)


def step(x, source, labels, t, codes):
    """All per-pixel ops in one function."""
    xt = fk.flow_interpolate(source, labels, t, codes)
    loss = fk.flow_loss(x * 0.5 + xt, source, labels, t, codes)
    extra = fk.distance_correction(x, labels, codes).square().mean()
    decoded = fk.nearest_centroid(x, codes, return_margin=True)
    counts = fk.decode_confusion(x, labels, codes)
    best = fk.top_classes(x.detach(), codes, 2)
    return loss + extra, *decoded, counts, *best, fk.class_probabilities(x.detach(), codes, form="logits")


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compiles_whole_forward_and_backward(backend, fresh_dynamo, mode, codes19):
    x, source, labels, t = image_batch(codes19.centroids, 2, 8, 10)
    x.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend=mode)
    want, got = step(x, source, labels, t, codes19), compiled(x, source, labels, t, codes19)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(got[0], x), torch.autograd.grad(want[0], x))


def test_compiles_the_neural_field_whole(backend, fresh_dynamo):
    dtype = dtype_for(backend)
    decoder = fk.NeuralFieldDecoder(10, hidden=8, patch_size=4, max_freqs=2).to(dtype)
    torch.nn.init.normal_(decoder.final_layer.linear.weight)
    x, s = torch.randn(2, 3, 8, 8, dtype=dtype), torch.randn(2, 4, 10, dtype=dtype)
    want = decoder(x, s)
    got = torch.compile(decoder, fullgraph=True, backend="aot_eager")(x, s)
    torch.testing.assert_close(got, want)
    names = [n for n, _ in decoder.named_parameters()]
    grads = [torch.autograd.grad(v.square().sum(), list(decoder.parameters())) for v in (got, want)]
    for name, a, b in zip(names, *grads):
        torch.testing.assert_close(a, b, msg=name)


def test_dynamic_shapes_do_not_recompile_the_neural_field(backend, fresh_dynamo):
    dtype = dtype_for(backend)
    decoder = fk.NeuralFieldDecoder(10, hidden=8, patch_size=4, max_freqs=2).to(dtype)
    torch.nn.init.normal_(decoder.final_layer.linear.weight)
    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in ((2, 8, 12), (3, 12, 8)):
            x = torch.randn(batch, 3, height, width, dtype=dtype)
            s = torch.randn(batch, height * width // 16, 10, dtype=dtype)
            got, want = (f(x, s) for f in (compiled, decoder))
            torch.testing.assert_close(got, want)
            for a, b in zip(*(torch.autograd.grad(v.square().sum(), [*decoder.parameters()]) for v in (got, want))):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_dynamic_shapes_do_not_recompile(backend, fresh_dynamo, codes19):
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in ((2, 8, 10), (3, 12, 6), (5, 7, 9)):
            x, source, labels, t = image_batch(codes19.centroids, batch, height, width)
            x.requires_grad_()
            got = compiled(x, source, labels, t, codes19)
            torch.testing.assert_close(got[0], step(x, source, labels, t, codes19)[0])
            got[0].backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_exports(backend, codes150):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decode = fk.CentroidDecoder(codes150)

        def forward(self, x):
            return self.decode(x)

    x, _, _, _ = image_batch(codes150.centroids)
    exported = torch.export.export(Step(), (x,))
    assert torch.equal(exported.module()(x), codes150.decode(x))


def test_autocast_leaves_the_pixel_ops_alone_and_casts_the_field(backend, codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    want = step(x, source, labels, t, codes150)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        got = step(x, source, labels, t, codes150)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype and torch.equal(a, b)
    field = [v.detach() for v in field_inputs(dtype=torch.float32)]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = fk.neural_field(*field, patch_size=4)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, fk.neural_field(*(v.bfloat16() for v in field), patch_size=4))


def test_second_derivatives_raise_by_name(codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    x.requires_grad_()
    source.requires_grad_()
    for name, out, leaf in (
        ("flow_loss_bwd", fk.flow_loss(x, source, labels, t, codes150), x),
        ("flow_interpolate_bwd", fk.flow_interpolate(source, labels, t, codes150).square().sum(), source),
    ):
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"flowseg::{name} has no derivative"):
            grad.square().sum().backward()


def test_forward_mode_raises_by_name(codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    calls = {
        "flow_loss": (lambda v: fk.flow_loss(v, source, labels, t, codes150), x),
        "flow_interpolate": (lambda v: fk.flow_interpolate(v, labels, t, codes150), source),
        "distance_correction": (lambda v: fk.distance_correction(v, labels, codes150), x),
        "class_probabilities": (lambda v: fk.class_probabilities(v, codes150), x),
        "top_classes": (lambda v: fk.top_classes(v, codes150, 2)[1], x),
    }
    for name, (call, value) in calls.items():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
                call(dual)
            assert torch.isfinite(call(value)).all()


def test_inputs_are_never_changed(backend, codes150):
    inputs = image_batch(codes150.centroids)
    before = copy.deepcopy(inputs)
    step(*inputs, codes150)
    for a, b in zip(inputs, before):
        assert torch.equal(a, b)


def test_zero_size_inputs_give_empty_or_zero(backend, codes150):
    for batch, height in ((0, 4), (2, 0)):
        x = torch.zeros(batch, 3, height, 5, requires_grad=True)
        labels = torch.zeros(batch, height, 5, dtype=torch.uint8)
        _, decoded, margin, counts, *_ = step(x, torch.zeros_like(x), labels, torch.zeros(batch), codes150)
        assert decoded.shape == margin.shape == labels.shape and not counts.any()
        vanilla = fk.flow_loss(x, torch.zeros_like(x), labels, torch.zeros(batch), codes150)
        assert vanilla.item() == 0 and torch.autograd.grad(vanilla, x)[0].shape == x.shape


def test_backward_uses_the_backend_of_its_forward(codes150, monkeypatch):
    """Backward may run outside the block and on another thread. It must use the backend of its forward."""
    if "cpu" not in fk.available_backends("flow_loss"):
        pytest.skip("needs two backends")
    calls = []
    for name in ("cpu", "reference"):
        chosen = OPS["flow_loss_bwd"][name]

        def run(*args, _chosen=chosen, _name=name):
            calls.append(_name)
            return _chosen.run(*args)

        monkeypatch.setitem(OPS["flow_loss_bwd"], name, type(chosen)(run, chosen.why_not))
    x, source, labels, t = image_batch(codes150.centroids)
    x.requires_grad_()
    with fk.use_backend("reference"):
        loss = fk.flow_loss(x, source, labels, t, codes150)
    with fk.use_backend("cpu"):
        loss.backward()
    # Use twice the loss: for the loss itself the C++ residual is already the gradient, and backward calls no op.
    thread = threading.Thread(target=lambda: (2 * fk.flow_loss(x, source, labels, t, codes150)).backward())
    thread.start()
    thread.join()
    assert calls == ["reference", "cpu"]


def test_no_array_over_classes_on_the_cpu(codes150):
    """At 512 x 512 and K = 150, one (B, K, H, W) fp32 array takes 157 MB; the kernels must stay far below."""
    script = """
    import resource, torch, flowseg_kernels as fk
    book = fk.Codebook(fk.kronecker_centroids(150, 3))
    labels = torch.randint(0, 150, (1, 512, 512), dtype=torch.uint8)
    x = book.encode(labels).requires_grad_()
    small = torch.zeros(1, 3, 8, 8, requires_grad=True)
    fk.flow_loss(small, small, labels[:, :8, :8], torch.zeros(1), book).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fk.flow_loss(x, torch.zeros_like(x), labels, torch.zeros(1), book).backward()
    fk.distance_correction(x, labels, book)
    fk.nearest_centroid(x, book.centroids, return_margin=True)
    fk.decode_confusion(x, labels, book)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    if "cpu" not in fk.available_backends("flow_loss"):
        pytest.skip("the reference does allocate such arrays")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KiB: residual, gradient, source, correction, labels and margin


def test_modules_pickle_and_copy(codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    module = fk.FlowLoss(codes150)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, source, labels, t), module(x, source, labels, t))


def test_meta_tensors_give_shapes(codes150):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8, 9)
        labels = torch.zeros(2, 8, 9, dtype=torch.uint8)
        book = codes150.centroids
        assert fk.distance_correction(x, labels, book, eps=0.1).shape == x.shape
        assert fk.nearest_centroid(x, book).shape == (2, 8, 9)
        assert fk.decode_confusion(x, labels, book).shape == (150, 150)
