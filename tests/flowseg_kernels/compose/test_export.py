"""torch.export with dynamic shapes, AOTInductor on the CPU, sizes known only at run time, fake tensors on every device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flowseg_kernels as fk

from .steps import OPS, EveryOp, batch, called

#: Shapes of neural_field's arguments after x, for two images of 8 x 12 pixels in patches of 4 x 4.
_FIELD = ((2, 6, 1, 256), (8, 7), (8,), (1, 8), (8,), (3, 8), (3,))


@pytest.fixture
def step(codes19):
    return EveryOp(codes19)


def test_export_takes_any_sizes_and_keeps_every_op(step, codes19):
    images, rows, columns = (torch.export.Dim(n, min=2, max=64) for n in ("images", "rows", "columns"))
    sizes = {0: images, 2: 4 * rows, 3: 4 * columns}
    shapes = {"source": sizes, "labels": {0: images, 1: 4 * rows, 2: 4 * columns}, "t": {0: images}}
    exported = torch.export.export(step, batch(codes19), dynamic_shapes=shapes)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert all(f"flowseg.{op}.default" in names for op in OPS)
    # The program runs anywhere: it contains no op of one backend.
    assert not [name for name in names if name.startswith(("flowseg_cpu", "flowseg_cuda"))]
    for sizes in ((2, 8, 12), (3, 16, 8), (5, 20, 24)):
        inputs = batch(codes19, *sizes)
        for got, want in zip(exported.module()(*inputs), step(*inputs)):
            torch.testing.assert_close(got, want)


def test_an_exported_program_survives_its_file(codes19, tmp_path, patch_chunk):
    step, inputs = EveryOp(codes19, patch_chunk=patch_chunk), batch(codes19)
    torch.export.save(torch.export.export(step, inputs), tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    for got, want in zip(loaded.module()(*inputs), step(*inputs)):
        torch.testing.assert_close(got, want)


def test_aot_inductor_packages_and_calls_every_op(step, codes19, tmp_path, monkeypatch):
    """The compiled step runs without Python code; importing flowseg_kernels registers the ops that it calls by name."""
    images = torch.export.Dim("images", min=1, max=64)
    shapes = {"source": {0: images}, "labels": {0: images}, "t": {0: images}}
    with torch.no_grad():
        exported = torch.export.export(step, batch(codes19), dynamic_shapes=shapes)
        # Little optimisation: the program runs twice, and compiling takes most of the time.
        quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "step.pt2"), inductor_configs=quick
        )
        compiled = torch._inductor.aoti_load_package(package)
        for count in (2, 5):
            inputs = batch(codes19, count)
            loss, correction, decoded, margin, counts = step(*inputs)
            with monkeypatch.context() as patch:
                calls = called(patch)
                got = compiled(*inputs)
            assert sorted(calls) == sorted(OPS)
            for value, want in zip(got, (loss, correction, decoded, margin)):
                assert value.shape == want.shape and value.dtype == want.dtype
            torch.testing.assert_close(got[0], loss, rtol=1e-4, atol=0)
            # The network's rounding differs, so a pixel may decode to another code.
            same = got[2] == decoded
            assert same.float().mean() > 0.99
            torch.testing.assert_close(got[3][same], margin[same], rtol=1e-3, atol=1e-4)
            assert got[4].shape == counts.shape and (got[4] - counts).abs().sum() <= 2 * (~same).sum()


def test_number_of_images_known_only_at_run_time(codes19):
    def kept(x, source, labels, t, keep):
        x, source, labels, t = x[keep], source[keep], labels[keep], t[keep]
        loss = fk.flow_loss(x, source, labels, t, codes19) + fk.flow_interpolate(source, labels, t, codes19).sum()
        correction = fk.distance_correction(x, labels, codes19)
        return loss, correction, fk.nearest_centroid(x, codes19), fk.decode_confusion(x, labels, codes19)

    source, labels, t = batch(codes19, 4)
    x = torch.randn_like(source)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True):
        torch._dynamo.reset()
        compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
        for keep in ([1, 0, 1, 1], [0, 1, 0, 0]):
            keep = torch.tensor(keep, dtype=torch.bool)
            for got, want in zip(compiled(x, source, labels, t, keep), kept(x, source, labels, t, keep)):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_shapes_and_dtypes_without_data_on_every_device(device, codes19):
    """Tracing for another machine sees tensors without data. No op may need values, a driver or a backend."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 12, device=device, dtype=torch.bfloat16)
        labels, t = torch.empty(2, 8, 12, dtype=torch.uint8, device=device), torch.empty(2, device=device)
        mu = torch.empty(19, 3, device=device)
        outs = (
            fk.flow_interpolate(x, labels, t, mu),
            fk.distance_correction(x, labels, mu, eps=0.1),
            fk.flow_loss(x, x, labels, t, mu, eps=0.1, reduction="none"),
            *fk.nearest_centroid(x, mu, out_dtype=torch.int16, return_distance=True),
            fk.decode_confusion(x, labels, mu),
            fk.neural_field(x, *(x.new_empty(shape) for shape in _FIELD), patch_size=4),
        )
        assert all(v.device.type == device for v in outs)
        bf16, fp32 = torch.bfloat16, torch.float32
        assert [v.dtype for v in outs] == [bf16, bf16, fp32, torch.int16, fp32, torch.int64, bf16]
        assert [tuple(v.shape) for v in outs] == [
            (2, 3, 8, 12), (2, 3, 8, 12), (2, 8, 12), (2, 8, 12), (2, 8, 12), (19, 19), (2, 3, 8, 12)
        ]  # fmt: skip


def test_autocast_for_cuda_casts_the_field_only():
    """Fake tensors need no GPU: the autocast rules are registered for the CUDA dispatch key."""
    with FakeTensorMode():

        def empty(*shape, dtype=torch.float32):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        x, labels, t, mu = empty(2, 3, 8, 8), empty(2, 8, 8, dtype=torch.uint8), empty(2), empty(19, 3)
        shapes = ((2, 4, 1, 256), (8, 7), (8,), (1, 8), (8,), (3, 8), (3,))
        kept = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        try:
            # torch.autocast turns itself off where torch has no CUDA.
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.float16)
            field = fk.neural_field(x, *(empty(*shape) for shape in shapes), patch_size=4)
            double = fk.neural_field(x.double(), *(empty(*shape).double() for shape in shapes), patch_size=4)
            loss = fk.flow_loss(x, x, labels, t, mu, eps=0.1)
            point = fk.flow_interpolate(x, labels, t, mu)
        finally:
            torch.set_autocast_enabled("cuda", kept[0])
            torch.set_autocast_dtype("cuda", kept[1])
        assert [v.dtype for v in (field, double, loss, point)] == [
            torch.float16, torch.float64, torch.float32, torch.float32
        ]  # fmt: skip


def test_backend_blocks_around_and_inside_compiled_code(codes19, monkeypatch):
    """A block around a compiled function causes no recompilation. A block inside breaks the graph and still applies."""
    source, _, _ = batch(codes19)

    def decode(x):
        return fk.nearest_centroid(x, codes19)

    def decode_by_reference(x):
        with fk.use_backend("reference"):
            return fk.nearest_centroid(x, codes19)

    backends = []
    from flowseg_kernels.runtime.backend import OPS as TABLE

    for name, chosen in list(TABLE["nearest_centroid"].items()):

        def run(*args, _run=chosen.run, _name=name):
            backends.append(_name)
            return _run(*args)

        monkeypatch.setitem(TABLE["nearest_centroid"], name, type(chosen)(run, chosen.why_not))
    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        want = compiled(source)
        with fk.use_backend("reference"):
            assert torch.equal(compiled(source), want)
        assert torch.equal(compiled(source), want)
    assert torch.equal(torch.compile(decode_by_reference, backend="aot_eager")(source), want)
    automatic = fk.available_backends("nearest_centroid")[0]
    assert backends == [automatic, "reference", automatic, "reference"]
