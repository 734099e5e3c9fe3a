import math

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.runtime.triton import INTERPRETED

from ...support.neural_field import VARIANTS, WIDTH, dtype_for, field_inputs, pixnerd_field
from ...support.samples import layouts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels, hidden, depth, ratio, p", [(3, 16, 2, 2, 4), (1, 8, 1, 1, 2), (8, 16, 3, 4, 4)])
def test_equals_pixnerd_in_values_and_every_gradient(channels, hidden, depth, ratio, p, variant):
    inputs = field_inputs(channels, hidden, depth, ratio, p, form=variant[1])
    want = pixnerd_field(*inputs, p, ratio, variant)
    got = fk.neural_field(*inputs, patch_size=p, mlp_ratio=ratio, normalise=variant[0], form=variant[1])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    leaves = [v for v in inputs if v is not None]
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_only_the_wanted_gradients(backend, brief):
    inputs = field_inputs(dtype=dtype_for(backend), batch=1 if brief else 2)
    every = torch.autograd.grad(fk.neural_field(*inputs, patch_size=4).square().sum(), inputs)
    for place, want in enumerate(every):
        mixed = [v if i == place else v.detach() for i, v in enumerate(inputs)]
        (grad,) = torch.autograd.grad(fk.neural_field(*mixed, patch_size=4).square().sum(), mixed[place])
        torch.testing.assert_close(grad, want)


def test_gradcheck():
    inputs = field_inputs(2, 4, 1, 1, 2, 2, batch=1, height=2, width=4)
    assert torch.autograd.gradcheck(lambda *v: fk.neural_field(*v, patch_size=2, mlp_ratio=1), inputs)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_second_and_forward_derivatives_are_those_of_the_formula(backend, variant):
    hidden = 2 if INTERPRETED else 4
    inputs = field_inputs(1, hidden, 1, 1, 2, 2, batch=1, height=2, width=4, form=variant[1])
    leaves = [v for v in inputs if v is not None]

    def run(*values):
        given = iter(values)
        every = [v if v is None else next(given) for v in inputs]
        return fk.neural_field(*every, patch_size=2, mlp_ratio=1, normalise=variant[0], form=variant[1])

    assert torch.autograd.gradgradcheck(run, leaves)
    tangents = tuple(torch.randn_like(v) for v in leaves)
    values = tuple(v.detach() for v in leaves)
    out, slope = torch.func.jvp(run, values, tangents)
    torch.testing.assert_close(out, run(*leaves))
    step = 1e-6
    ends = [run(*(v + sign * step * t for v, t in zip(values, tangents))) for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)
    grads = torch.func.grad(lambda *v: run(*v).square().sum(), argnums=tuple(range(len(values))))(*values)
    for a, b in zip(grads, torch.autograd.grad(run(*leaves).square().sum(), leaves)):
        torch.testing.assert_close(a, b)


def values_and_gradients(call, inputs, dtype):
    """Return call(*leaves) in a dtype, and the gradients of all leaves for a fixed weighting of the output."""
    leaves = [v if v is None else v.detach().to(dtype).requires_grad_() for v in inputs]
    out = call(*leaves)
    # The weights are not centred on zero: the gradient of a bias of one number would be all cancellation.
    weighting = (1.5 + torch.arange(out.numel(), dtype=torch.float64).cos()).view(out.shape).to(dtype)
    return [out, *torch.autograd.grad(out, [v for v in leaves if v is not None], weighting)]


SIZES = {  # channels, hidden, depth, ratio, p, freqs
    "small": (3, 16, 2, 2, 4, 4),
    "pixnerd": (3, 64, 2, 2, 16, 8),
    "wide": (16, 128, 1, 1, 4, 3),
    "deep": (1, 32, 8, 4, 8, 2),
    # 81 pixels and 200 inner units: neither fills the tiles and slices of the CUDA kernels.
    "sliced": (5, 40, 2, 5, 9, 3),
    # The same for the kernels for more than 64 hidden units: 72 of 128 hidden units and 144 of 192 inner units.
    "wide and sliced": (3, 72, 2, 2, 9, 3),
}


def assert_errors_at_most_twice_plain_pytorch(made, dtype, p, ratio, variant):
    """Compare the norms of the errors of the output and of every gradient, against fp64. Four ulp are always allowed."""
    inputs = [v if v is None else v.to(dtype) for v in made]
    options = {"patch_size": p, "mlp_ratio": ratio, "normalise": variant[0], "form": variant[1]}

    def plain(*leaves):
        return pixnerd_field(*leaves, p, ratio, variant)

    exact = values_and_gradients(plain, inputs, torch.float64)
    theirs = values_and_gradients(plain, inputs, dtype)
    ours = values_and_gradients(lambda *leaves: fk.neural_field(*leaves, **options), inputs, dtype)
    for place, (want, a, b) in enumerate(zip(exact, ours, theirs)):
        assert a.dtype == dtype
        chance = 4 * torch.finfo(torch.float32).eps * want.norm()
        assert (a - want).norm() <= max(2 * (b - want).norm(), chance), place


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_errors_are_at_most_twice_plain_pytorch(brief, size, dtype, variant):
    if brief:
        # PixNerd's sizes run in PixNerd's variant, every other size and dtype in one of the four variants.
        turn = 0 if size == "pixnerd" else list(SIZES).index(size) + DTYPES.index(dtype)
        if VARIANTS.index(variant) != turn % len(VARIANTS):
            pytest.skip("kernels without a GPU are slow: another variant is tested for this size and dtype")
    channels, hidden, depth, ratio, p, freqs = SIZES[size]
    batch, across = ((2, 2) if size == "small" else (1, 1)) if brief else (2, 3)
    made = field_inputs(
        channels, hidden, depth, ratio, p, freqs, batch=batch, height=p, width=across * p, form=variant[1]
    )
    assert_errors_at_most_twice_plain_pytorch(made, dtype, p, ratio, variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p, tiles, together", [(16, (8, 4), (4, 4)), (24, (18, 9), (2, 1))])
def test_several_tiles_in_a_program(backend, monkeypatch, p, tiles, together, dtype):
    """Programs take several tiles, as for a large image. Nine tiles do not divide by two, so programs take one each."""
    if backend != "triton":
        pytest.skip("only the Triton kernels have tiles")
    from flowseg_kernels.ops.neural_field import triton_settings

    monkeypatch.setattr(triton_settings, "_PROGRAMS_AT_ONCE", 2)
    made = field_inputs(2, 16, 1, 1, p, 2, batch=1, height=p, width=2 * p)
    place = (torch.float32, torch.bfloat16).index(dtype)
    for kernel in ("forward", "states"):
        rows = triton_settings.launch_settings(kernel, 16, 16, p * p, dtype).rows
        assert (
            -(-p * p // rows) == tiles[place] and triton_settings.tiles_per_program(2, p * p, rows) == together[place]
        )
    assert_errors_at_most_twice_plain_pytorch(made, dtype, p, 1, VARIANTS[0])


@pytest.mark.parametrize("channels, hidden, ratio, p", [(1, 8, 1, 2), (5, 24, 1, 3), (3, 7, 3, 5), (3, 16, 2, 32)])
def test_odd_sizes(brief, channels, hidden, ratio, p):
    """Widths and patches that do not fill a vector, and patches of many panels."""
    if brief and p == 32:
        pytest.skip("the interpreter is slow: test_several_tiles_in_a_program has patches of many tiles")
    inputs = field_inputs(channels, hidden, 2, ratio, p, 2, batch=1, height=2 * p, width=p)
    exact = values_and_gradients(lambda *v: pixnerd_field(*v, p, ratio), inputs, torch.float64)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        got = values_and_gradients(lambda *v: fk.neural_field(*v, patch_size=p, mlp_ratio=ratio), inputs, dtype)
        for place, (a, want) in enumerate(zip(got, exact)):
            assert (a - want).norm() <= tolerance * want.norm(), (place, dtype)


def test_any_layout_of_pixels_and_weights(backend):
    dtype = dtype_for(backend)
    inputs = [v.detach() for v in field_inputs(dtype=dtype)]
    want = values_and_gradients(lambda *v: fk.neural_field(*v, patch_size=4), inputs, dtype)
    views = zip(layouts(inputs[0]), layouts(inputs[1]))
    for (name, x), (_, weights) in views:
        leaves = [v.detach().requires_grad_() for v in (x, weights, *inputs[2:])]
        out = fk.neural_field(*leaves, patch_size=4)
        weighting = (1.5 + torch.arange(out.numel()).double().cos()).view(out.shape).to(dtype)
        strided = weighting.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        for a, b in zip((out, *torch.autograd.grad(out, leaves, strided)), want):
            torch.testing.assert_close(a, b, msg=name)
    # The gradient of a sum is expanded: its strides are zero.
    leaves = [v.requires_grad_() for v in inputs]
    expanded = torch.autograd.grad(fk.neural_field(*leaves, patch_size=4).sum(), leaves)
    ones = torch.autograd.grad(fk.neural_field(*leaves, patch_size=4), leaves, torch.ones_like(leaves[0]))
    for a, b in zip(expanded, ones):
        torch.testing.assert_close(a, b)


def test_no_patches_and_no_blocks(backend):
    for change in ({"batch": 0}, {"height": 0}, {"depth": 0}):
        leaves = field_inputs(dtype=dtype_for(backend), **change)
        out = fk.neural_field(*leaves, patch_size=4)
        assert out.shape == leaves[0].shape
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert all(g.shape == v.shape and torch.isfinite(g).all() for g, v in zip(grads, leaves))
        if "depth" not in change:
            assert not any(g.any() for g in grads)


def test_results_do_not_depend_on_threads(backend):
    """Shared gradients of 150 patches are summed in groups of three; the last group is short."""
    if backend in ("triton", "cuda"):
        pytest.skip("GPU kernels use no CPU threads; test_a_run_repeats_bit_for_bit repeats a run")
    inputs = field_inputs(3, 16, 1, 1, 4, 2, torch.float32, batch=2, height=12, width=100)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                values_and_gradients(lambda *v: fk.neural_field(*v, patch_size=4, mlp_ratio=1), inputs, torch.float32)
            )
    finally:
        torch.set_num_threads(threads)
    if backend == "reference":
        pytest.skip("PyTorch's sums may depend on the number of threads")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_a_run_repeats_bit_for_bit(backend):
    dtype = dtype_for(backend)
    inputs = field_inputs(3, 16, 1, 1, 4, 2, dtype, batch=1, height=4, width=36)
    first, again = (
        values_and_gradients(lambda *v: fk.neural_field(*v, patch_size=4, mlp_ratio=1), inputs, dtype) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_rounds_of_the_triton_backward(backend, monkeypatch):
    """Run 9 patches in one round, then in rounds of two, of which the last is short."""
    if backend != "triton":
        pytest.skip("only the Triton backward takes patches in rounds")
    from flowseg_kernels.ops.neural_field import triton_settings

    inputs = field_inputs(3, 16, 1, 1, 4, 2, torch.float32, batch=1, height=4, width=36)

    def run():
        return values_and_gradients(lambda *v: fk.neural_field(*v, patch_size=4, mlp_ratio=1), inputs, torch.float32)

    want = run()
    monkeypatch.setattr(triton_settings, "_PATCHES_PER_ROUND", 2)
    assert triton_settings.patches_per_round(9, 1) == 2
    got = run()
    for place, (a, b) in enumerate(zip(got, want)):
        torch.testing.assert_close(a, b, msg=str(place))
    assert all(torch.equal(got[place], want[place]) for place in (0, 1, 2))  # these have no sum over patches


def test_a_nan_stays_in_its_pixel(backend):
    inputs = [v.detach() for v in field_inputs(dtype=dtype_for(backend))]
    want = fk.neural_field(*inputs, patch_size=4)
    inputs[0][0, 1, 5, 2] = float("nan")
    got = fk.neural_field(*inputs, patch_size=4)
    hit = torch.zeros_like(want, dtype=torch.bool)
    hit[0, :, 5, 2] = True
    assert got[hit].isnan().all()
    torch.testing.assert_close(got[~hit], want[~hit])


@pytest.mark.parametrize("normalise", ["both", "first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_weights_have_finite_gradients(backend, brief, dtype, normalise):
    inputs = list(field_inputs(dtype=dtype, batch=1, depth=1 if brief else 2))
    inputs[1] = torch.zeros_like(inputs[1]).requires_grad_()
    out = fk.neural_field(*inputs, patch_size=4, normalise=normalise)
    (grad,) = torch.autograd.grad(out.sum(), inputs[1])
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("again", [False, True])
def test_second_derivatives_where_inputs_depend_on_each_other(backend, again):
    """As in a gradient penalty, the incoming gradient depends on x, and the weights depend on another input of the loss."""

    def penalty(field):
        torch.manual_seed(3)
        x, weights, *rest = field_inputs(1, 4, 1, 1, 2, 2, batch=1, height=2, width=4)
        generated = weights * x.mean()
        (slope,) = torch.autograd.grad(field(x, generated, *rest).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, weights, *rest], create_graph=again, allow_unused=True)

    got = penalty(lambda *v: fk.neural_field(*v, patch_size=2, mlp_ratio=1))
    want = penalty(lambda *v: pixnerd_field(*v, 2, 1))
    assert sum(v is not None for v in want) >= 7
    for a, b in zip(got, want):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_incoming_gradient_reaches_only_the_weights_of_its_patch(backend, brief, dtype, bad):
    """A loss scaler must see an overflow in the gradients of the weights too: they may be the only ones in training."""
    inputs = field_inputs(dtype=dtype, batch=1, depth=1)
    out = fk.neural_field(*inputs, patch_size=4)
    incoming = torch.full_like(out, 0.1)
    incoming[0, 1, 5, 2] = bad
    (grad,) = torch.autograd.grad(out, inputs[1], incoming)
    hit = 1 * (WIDTH // 4)  # the patch of row 5 and column 2
    assert not torch.isfinite(grad[0, hit]).any()
    grad[0, hit] = 0
    assert torch.isfinite(grad).all()


def decoder_and_inputs(batch=3, height=12, width=8, **options):
    """A decoder with patches of 4 x 4 pixels, an image x and its patches' features s."""
    torch.manual_seed(1)
    decoder = fk.NeuralFieldDecoder(10, hidden=16, depth=2, patch_size=4, max_freqs=3, **options)
    torch.nn.init.normal_(decoder.final_layer.linear.weight)
    patches = (height // 4) * (width // 4)
    x = torch.randn(batch, 3, height, width, requires_grad=True)
    return decoder, x, torch.randn(batch, patches, 10, requires_grad=True)


@pytest.mark.parametrize("form", ["residual", "plain"])
@pytest.mark.parametrize("patch_chunk", [1, 4, 7, 100])
def test_chunks_of_patches_change_nothing(brief, patch_chunk, form):
    """Patches per chunk: 1 gives chunks of one row of two, 4 of two rows, 7 of one image of six, 100 of everything."""
    if brief and (patch_chunk, form) not in ((4, "residual"), (7, "plain")):
        pytest.skip("chunks do not depend on the backend")
    found = []
    for chunk in (None, patch_chunk):
        decoder, x, s = decoder_and_inputs(2 if brief else 3, patch_chunk=chunk, form=form)
        out = decoder(x, s)
        found.append((out, *torch.autograd.grad(out.sin().sum(), [x, s, *decoder.parameters()])))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_chunks_compile_whole_cast_and_honour_frozen_inputs(brief):
    torch._dynamo.reset()
    # Chunks are two rows and one row of each image; the slow interpreter takes two patches as two chunks.
    sizes, chunk = ({"batch": 1, "height": 8, "width": 4}, 1) if brief else ({"batch": 3}, 4)
    decoder, x, s = decoder_and_inputs(**sizes, patch_chunk=chunk)
    whole, _, _ = decoder_and_inputs(**sizes)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    outs = compiled(x, s), whole(x, s)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(v.sin().sum(), [s, *m.parameters()]) for v, m in zip(outs, (decoder, whole))]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    decoder.requires_grad_(False)
    (grad,) = torch.autograd.grad(decoder(x.detach(), s).sin().sum(), s)
    torch.testing.assert_close(grad, grads[1][0], rtol=1e-4, atol=1e-4)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        outs = decoder(x, s), whole(x, s)
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    for a, b in zip(*(torch.autograd.grad(v.float().sin().sum(), [x, s]) for v in outs)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_a_denser_grid_agrees_where_points_are_shared(backend):
    """At 2 p - 1 pixels per side, every second pixel is at the position of a pixel of the trained grid."""
    decoder, x, s = decoder_and_inputs()
    coarse = decoder(x, s)
    patches = x.view(3, 3, 3, 4, 2, 4)
    dense = torch.randn(3, 3, 3, 7, 2, 7)
    dense[:, :, :, ::2, :, ::2] = patches.detach()
    fine = decoder(dense.reshape(3, 3, 21, 14), s, patch_size=7)
    torch.testing.assert_close(fine.view(dense.shape)[:, :, :, ::2, :, ::2].reshape(coarse.shape), coarse)


@pytest.mark.parametrize("generator", ["param_generator1.0", "param_generator1"])
@pytest.mark.parametrize("prefix", ["", "ema_denoiser."])
def test_decoder_starts_at_zero_and_loads_pixnerd(prefix, generator):
    decoder = fk.NeuralFieldDecoder(10, hidden=8, depth=2, patch_size=4, max_freqs=2)
    x, s = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 10)
    assert decoder(x, s).shape == x.shape and not decoder(x, s).any()
    theirs = {}
    for name, value in decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(int(parts[1]) + 22)
        theirs[prefix + ".".join(parts).replace("param_generator1", generator)] = torch.randn_like(value)
    theirs[prefix + "blocks.0.attn.qkv.weight"] = torch.zeros(1)
    decoder.load_pixnerd(theirs, first_block=22, prefix=prefix)
    assert torch.equal(decoder.blocks[1].norm.weight, theirs[prefix + "blocks.23.norm.weight"]) and decoder(x, s).any()
    assert torch.equal(decoder.blocks[0].param_generator1.bias, theirs[f"{prefix}blocks.22.{generator}.bias"])
    with pytest.raises(KeyError, match=rf"state_dict: wanted the keys {prefix}blocks\.20\.param_generator1\.0\.weight"):
        decoder.load_pixnerd(theirs, first_block=20, prefix=prefix)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a.update(x=torch.randn(2, 3, 9, 12)), "x: wanted height and width divisible by patch_size 4"),
        (lambda a: a.update(weights=torch.randn(2, 5, 2, 1024)), r"weights: wanted shape \(2, 6, L, 1024\)"),
        (lambda a: a.update(embed_weight=torch.randn(16, 20)), "embed_weight: wanted shape"),
        (
            lambda a: a.update(norm_weight=torch.randn(1, 16)),
            r"norm_weight: wanted shape \(L, Hx\) = \(2, 16\); got \(1, 16\)",
        ),
        (lambda a: a.update(out_bias=torch.randn(4)), r"out_bias: wanted shape \(C,\) = \(3,\); got \(4,\)"),
    ],
)
def test_bad_arguments_are_named(change, words):
    names = ("x", "weights", "embed_weight", "embed_bias", "norm_weight", "out_norm_weight", "out_weight", "out_bias")
    arguments = dict(zip(names, field_inputs(dtype=torch.float32)))
    change(arguments)
    with pytest.raises(ValueError, match=words):
        fk.neural_field(**arguments, patch_size=4)


@pytest.mark.parametrize("side", [-1, 1])
def test_error_of_the_approximate_tanh(side):
    """SiLU and its derivative as the bf16 kernels compute them on NVIDIA GPUs, where the interpreter cannot run.

    PTX bounds the relative error of tanh.approx.f32 by 2^-11 (PTX ISA 9.7.3.22). Here every z has that error, always to the same
    side. Around zero the result is within bf16's own error. For large negative z, SiLU vanishes but the error stays, in proportion
    to z.
    """

    def errors(z):
        exact = z.clone().requires_grad_()
        want = torch.nn.functional.silu(exact)
        (want_slope,) = torch.autograd.grad(want.sum(), exact)
        theirs = z.bfloat16().requires_grad_()
        plain = torch.nn.functional.silu(theirs)
        (plain_slope,) = torch.autograd.grad(plain.sum(), theirs)
        y = 0.5 * z.float()
        t = y.tanh() * (1 + side * 2.0**-11)
        u = y * t + y
        slope = 0.5 * (1 + t + u * (1 - t))
        for ours, other, right in ((u, plain, want), (slope, plain_slope, want_slope)):
            right = right.detach()
            ratio = (ours.bfloat16() - right).norm() / (other.detach() - right).norm()
            yield (ours - right).abs(), float(ratio)

    for _, ratio in errors(torch.randn(1 << 16, dtype=torch.float64)):
        assert ratio <= 2
    z = torch.linspace(-12, -4, 1 << 14, dtype=torch.float64)
    (silu, ratio), (slope, slope_ratio) = errors(z)
    assert (silu <= z.abs() * 2.0**-12 * 1.001).all() and (slope <= (1 + z.abs()) * 2.0**-12 * 1.001).all()
    # docs/ops/neural_field.md quotes these two ratios.
    assert (round(ratio), round(slope_ratio)) == (14, 17)
