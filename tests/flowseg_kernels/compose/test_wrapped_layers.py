"""The decoder with layers that are wrapped, hooked, replaced or reparametrised: the result is that of calling every layer.

The expected value comes from `algebra`, which computes the decoder's formula with a module call per layer.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import flowseg_kernels as fk
from flowseg_kernels.nn import _FieldBlock
from flowseg_kernels.ops.neural_field.reference import cosine_features
from flowseg_kernels.runtime.backend import requested_backend

from .steps import called

LAYERS = {
    "generator": "blocks.1.param_generator1",
    "embedder": "x_embedder.embedder.0",
    "norm": "blocks.0.norm",
    "last norm": "final_layer.norm",
    "last": "final_layer.linear",
}
LINEAR = ("generator", "embedder", "last")
PATCH = 4


def build(seed=0, **options):
    """A decoder and its inputs: 2 images of 8 x 8 pixels with 4 patches each."""
    torch.manual_seed(seed)
    decoder = fk.NeuralFieldDecoder(6, hidden=8, depth=2, patch_size=PATCH, max_freqs=2, **options)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return decoder, torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)


def algebra(decoder, x, s):
    """decoder(x, s) in the residual form, with a module call per layer."""
    patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    pixels = patches.unflatten(1, (3, PATCH**2)).transpose(1, 2)
    table = cosine_features(PATCH, 2, dtype=x.dtype, device=x.device).expand(len(pixels), -1, -1)
    h = decoder.x_embedder(torch.cat([pixels, table], dim=-1))
    for block in decoder.blocks:
        generated = block.param_generator1(s).flatten(0, 1)
        w1 = generated[:, : generated.shape[1] // 2].unflatten(1, (8, 16))
        w2 = generated[:, generated.shape[1] // 2 :].unflatten(1, (16, 8))
        w1, w2 = (F.normalize(w, dim=1) for w in (w1, w2))
        h = h + F.silu(block.norm(h) @ w1) @ w2
    out = decoder.final_layer(h).transpose(1, 2).flatten(1).unflatten(0, (len(x), -1)).transpose(1, 2)
    return F.fold(out, x.shape[2:], PATCH, stride=PATCH)


class Adapter(nn.Module):
    """An adapter like PEFT's: it exposes the base layer's weight and bias, and adds to the base layer's output."""

    def __init__(self, base, dropout=0.0):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        wide = base.weight.ndim == 2
        into, out = (base.in_features, base.out_features) if wide else 2 * base.normalized_shape
        self.down, self.up, self.dropout = nn.Linear(into, 2, bias=False), nn.Linear(2, out, False), nn.Dropout(dropout)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, v):
        return self.base_layer(v) + self.up(self.down(self.dropout(v)))


class Sum(torch.Tensor):
    """A wrapper subclass, as quantised and sharded weights are. Its value is the sum of two inner tensors."""

    @staticmethod
    def __new__(cls, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, device=a.device)

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @staticmethod
    def __tensor_unflatten__(parts, meta, size, stride):
        return Sum(parts["a"], parts["b"])

    @classmethod
    def __torch_dispatch__(cls, op, types, args, kwargs=None):
        if op is torch.ops.aten.detach.default:
            return Sum(args[0].a, args[0].b)
        # A custom op would read wrong data from this subclass.
        assert op.namespace == "aten", op
        plain = torch.utils._pytree.tree_map_only(Sum, lambda v: v.a + v.b, args)
        return op(*plain, **(kwargs or {}))


def replaced(change):
    """A modification that replaces the layer by change(layer)."""

    def apply(decoder, path):
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, change(decoder.get_submodule(path)))

    return apply


def changed(change):
    """A modification that calls change(layer)."""
    return lambda decoder, path: change(decoder.get_submodule(path))


def other_forward(layer):
    """Set a forward on the layer, as accelerate does."""
    old = layer.forward
    layer.forward = lambda v: old(v + 0.25)


def other_norm(layer):
    return nn.RMSNorm(8, eps=0.1, elementwise_affine=False) if isinstance(layer, nn.RMSNorm) else without_bias(layer)


def without_bias(layer):
    return nn.Linear(layer.in_features, layer.out_features, bias=False)


def subclass_weight(layer):
    layer.weight = nn.Parameter(Sum(layer.weight.data, torch.ones_like(layer.weight)), requires_grad=False)


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 0.5


MODIFICATIONS = {
    "adapter": replaced(Adapter),
    "sequence": replaced(lambda layer: nn.Sequential(layer, nn.Tanh())),
    "other layer": replaced(other_norm),
    "own forward": changed(other_forward),
    "forward hook": changed(lambda layer: layer.register_forward_hook(lambda m, args, out: out + 0.5)),
    "pre-hook": changed(lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] + 0.25,))),
    "keyword pre-hook": changed(
        lambda layer: layer.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 0.25,), kwargs), with_kwargs=True)
    ),
    "backward hook": changed(
        lambda layer: layer.register_full_backward_hook(lambda m, into, out: tuple(v if v is None else 2 * v for v in into))
    ),
    "backward pre-hook": changed(lambda layer: layer.register_full_backward_pre_hook(lambda m, out: (2 * out[0],))),
    "pruned": changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "pruned twice": changed(
        lambda layer: [prune.random_unstructured(layer, "weight", 0.3), prune.l1_unstructured(layer, "weight", 0.3)]
    ),
    "weight_norm": changed(nn.utils.weight_norm),
    "weight_norm by parametrization": changed(parametrizations.weight_norm),
    "spectral_norm": changed(nn.utils.spectral_norm),
    "spectral_norm by parametrization": changed(parametrizations.spectral_norm),
    "parametrization": changed(lambda layer: parametrize.register_parametrization(layer, "weight", Shifted())),
    "hooked parametrization": changed(
        lambda layer: parametrize.register_parametrization(layer, "weight", Shifted()).register_forward_hook(
            lambda m, args, out: out + 0.5
        )
    ),
    "wrapper subclass": changed(subclass_weight),
}  # fmt: skip


def two_steps(forward, decoder, x, s):
    """Outputs and input gradients of two steps of gradient descent, and all parameters afterwards."""
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], 0.05)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        out = forward(x, s)
        found.append(out.detach())
        found += torch.autograd.grad(out.square().mean(), [x, s], retain_graph=True)
        out.square().mean().backward(inputs=[p for p in decoder.parameters() if p.requires_grad])
        optimizer.step()
    return found, {name: p for name, p in decoder.named_parameters() if p.requires_grad}


def compare(got, want):
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    assert got[1].keys() == want[1].keys()
    for name, value in got[1].items():
        torch.testing.assert_close(value, want[1][name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def applied(modification, layer, **options):
    decoder, x, s = build(**options)
    torch.manual_seed(7)
    MODIFICATIONS[modification](decoder, LAYERS[layer])
    return decoder, x, s


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("modification", MODIFICATIONS)
def test_two_steps_equal_those_of_calling_every_layer(modification, layer, patch_chunk):
    decoder, x, s = applied(modification, layer, patch_chunk=patch_chunk)
    other, _, _ = applied(modification, layer)
    compare(two_steps(decoder, decoder, x, s), two_steps(lambda x, s: algebra(other, x, s), other, x, s))
    # Check that the modification changes the output, else the comparison proves nothing.
    assert modification.startswith(("backward", "weight_norm")) or not torch.allclose(
        applied(modification, layer)[0](x, s), build()[0](x, s), rtol=1e-3
    )


CONTAINERS = ("x_embedder", "x_embedder.embedder", "blocks.0", "final_layer")


@pytest.mark.parametrize("path", CONTAINERS)
def test_a_hook_on_a_module_that_holds_layers_runs(path, patch_chunk):
    decoder, x, s = build(patch_chunk=patch_chunk)
    want = decoder(x, s)
    calls = []
    decoder.get_submodule(path).register_forward_hook(lambda m, args, out: calls.append(m))
    torch.testing.assert_close(decoder(x, s), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == (1 if patch_chunk is None else 4)


class Transparent(nn.Module):
    """A wrapper that forwards the call and hides the layer's attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


@pytest.mark.parametrize("form", ["residual", "plain"])
@pytest.mark.parametrize("path", (*CONTAINERS, *LAYERS.values()))
def test_a_wrapper_that_hides_the_layer_changes_nothing(path, form, patch_chunk):
    if form == "plain" and path.endswith("norm"):
        pytest.skip("the plain form has no norms")
    decoder, x, s = build(patch_chunk=patch_chunk, form=form)
    want = torch.autograd.grad(decoder(x, s).sin().sum(), [x, s])
    replaced(Transparent)(decoder, path)
    for a, b in zip(torch.autograd.grad(decoder(x, s).sin().sum(), [x, s]), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Doubled(_FieldBlock):
    def forward(self, s, h=None, both=True):
        return super().forward(2 * s, h, both)


def test_an_overridden_forward_of_a_block_runs(patch_chunk):
    decoder, x, s = build(patch_chunk=patch_chunk)
    want = decoder(x, 2 * s)
    for block in decoder.blocks:
        block.__class__ = Doubled
    torch.testing.assert_close(decoder(x, s), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_see_what_goes_in_and_out(layer):
    """Hooks see the formula's values and shapes: states of all pixels of each patch, or the patch features."""
    seen = []
    for forward in (lambda d, x, s: d(x, s), algebra):
        decoder, x, s = build()
        for hooked in LAYERS.values():
            # Hook this layer only; for the generator, hook all layers together.
            if hooked == LAYERS[layer] or layer == "generator":
                decoder.get_submodule(hooked).register_forward_hook(lambda m, args, out: seen[-1].extend((*args, out)))
        seen.append([])
        forward(decoder, x, s)
    assert len(seen[0]) == len(seen[1]) == (10 if layer == "generator" else 2)
    for got, want in zip(*seen):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "modification, layer, fused",
    [
        ("adapter", "generator", True), ("forward hook", "generator", True), ("pruned", "last", True),
        ("weight_norm by parametrization", "embedder", True), ("spectral_norm", "norm", True),
        ("adapter", "last", False), ("forward hook", "norm", False), ("backward hook", "embedder", False),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_fused_op_runs_whenever_it_is_correct(modification, layer, fused, patch_chunk, monkeypatch):
    decoder, x, s = applied(modification, layer, patch_chunk=patch_chunk)
    calls = called(monkeypatch, ["neural_field"])
    decoder(x, s)
    assert len(calls) == (0 if not fused else 1 if patch_chunk is None else 4)


@pytest.mark.parametrize("form", ["residual", "plain"])
@pytest.mark.parametrize("normalise", ["both", "first"])
@pytest.mark.parametrize(
    "dtype, cast", [(torch.float32, False), (torch.float64, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_module_calls_agree_with_the_fused_op(form, normalise, dtype, cast, patch_chunk):
    """In every form and dtype, and with denser pixels. A hook that does nothing forces the module calls."""
    found = []
    for hooked in (False, True):
        decoder, x, s = build(form=form, normalise=normalise, patch_chunk=patch_chunk if hooked else None)
        decoder, x, s = decoder.to(dtype), F.interpolate(x, scale_factor=1.75).to(dtype), s.to(dtype)
        if hooked:
            decoder.final_layer.linear.register_forward_hook(lambda m, args, out: None)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=cast):
            out = decoder(x, s, patch_size=7)
        assert out.is_contiguous()
        found.append([out, *torch.autograd.grad(out.float().square().mean(), list(decoder.parameters()))])
    low = cast or dtype == torch.bfloat16
    assert found[0][0].dtype == found[1][0].dtype == (torch.bfloat16 if low else dtype)
    for want, got in zip(*found):
        scale = float(want.detach().abs().max())
        limit = {torch.float64: 1e-10}.get(dtype, 1e-4) if not low else 0.05
        torch.testing.assert_close(got, want, rtol=limit, atol=limit * scale)


def test_dropout_of_an_adapter_is_the_same_in_backward(patch_chunk):
    """Compare with the formula, chunk by chunk from the same seed: backward must draw the same random numbers again."""
    decoder, x, s = build(patch_chunk=patch_chunk)
    replaced(lambda layer: Adapter(layer, 0.5))(decoder, LAYERS["generator"])
    adapter = list(decoder.blocks[1].param_generator1.up.parameters())
    torch.manual_seed(3)
    got = decoder(x, s)
    # Drawing random numbers between forward and backward must not matter.
    grads = torch.autograd.grad(got.square().mean(), adapter, torch.rand(()) * 0 + 1)
    torch.manual_seed(3)
    if patch_chunk is None:
        want = algebra(decoder, x, s)
    else:
        rows = [
            [algebra(decoder, x[i : i + 1, :, 4 * j : 4 * j + 4], s[i : i + 1, 2 * j : 2 * j + 2]) for j in (0, 1)]
            for i in (0, 1)
        ]
        want = torch.cat([torch.cat(row, dim=2) for row in rows])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, torch.autograd.grad(want.square().mean(), adapter), rtol=1e-4, atol=1e-5)


def test_chunks_drop_the_weights_of_a_called_generator():
    """Backward generates them again per chunk; without gradients nothing runs twice."""
    decoder, x, s = build(patch_chunk=2)
    rows = []
    for block in decoder.blocks:
        block.param_generator1.register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape[:2])))
    with torch.no_grad():
        decoder(x, s)
    assert rows == [(1, 2)] * 8
    rows.clear()
    decoder(x, s).sum().backward()
    assert rows == [(1, 2)] * 16


def test_backward_recomputes_a_chunk_on_the_backend_of_its_forward():
    decoder, x, s = build(patch_chunk=2)
    backends = []
    decoder.blocks[0].param_generator1.register_forward_pre_hook(lambda m, args: backends.append(requested_backend()))
    with fk.use_backend("reference"):
        loss = decoder(x, s).sum()
    loss.backward()
    assert backends == ["reference"] * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quant:UserWarning")
def test_dynamic_quantisation_quantises_every_linear_layer(patch_chunk):
    decoder, x, s = build(patch_chunk=patch_chunk)
    quantised = torch.ao.quantization.quantize_dynamic(decoder.eval(), {nn.Linear}, dtype=torch.qint8)
    assert len([m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]) == 4
    with torch.no_grad():
        if patch_chunk is not None:
            # Compare one chunk: dynamic quantisation chooses a scale per call.
            torch.testing.assert_close(quantised(x[:1, :, :4], s[:1, :2]), algebra(quantised, x[:1, :, :4], s[:1, :2]))
        else:
            torch.testing.assert_close(quantised(x, s), algebra(quantised, x, s), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(quantised(x, s), decoder(x, s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer, chunk", [("generator", 2), ("last", None)])
def test_an_adapter_compiles_whole(layer, chunk):
    decoder, x, s = applied("adapter", layer, patch_chunk=chunk)
    torch._dynamo.reset()
    outs = torch.compile(decoder, fullgraph=True, backend="aot_eager")(x, s), decoder(x, s)
    wanted = [x, s, *(p for p in decoder.parameters() if p.requires_grad)]
    for a, b in zip(*([out, *torch.autograd.grad(out.square().mean(), wanted)] for out in outs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"s": torch.zeros(2, 5, 6)}, r"s: wanted shape \(2, 4, 6\) for x \(2, 3, 8, 8\) in patches of 4 x 4; got \(2, 5, 6\)"),
        ({"s": torch.zeros(2, 4, 7)}, r"s: wanted shape \(2, 4, 6\)"),
        ({"s": torch.zeros(2, 4)}, r"s: wanted shape \(B, N, D\)"),
        ({"x": torch.zeros(2, 3, 9, 8)}, "x: wanted height and width divisible by patch_size 4"),
        ({"patch_size": 0}, "patch_size: wanted a finite number above 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("hooked", [False, True])
def test_a_bad_argument_is_named_with_and_without_module_calls(change, words, hooked, patch_chunk):
    decoder, x, s = build(patch_chunk=patch_chunk)
    if hooked:
        decoder.final_layer.linear.register_forward_hook(lambda m, args, out: None)
    with pytest.raises(ValueError, match=words):
        decoder(**{"x": x, "s": s, **change})


@pytest.mark.parametrize("name", ["dim", "channels", "hidden", "depth", "mlp_ratio", "patch_size", "max_freqs"])
def test_a_size_of_zero_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: wanted a finite number above 0"):
        fk.NeuralFieldDecoder(**{"dim": 6, name: 0})


def test_an_empty_batch_has_no_pixels(patch_chunk):
    decoder, x, s = applied("adapter", "last", patch_chunk=patch_chunk)
    assert decoder(x[:0], s[:0]).shape == (0, 3, 8, 8)
