"""Layers of the decoder that other tools wrapped, hooked, replaced or reparametrised: the decoder calls what stands there.

The right value is always `algebra`: the decoder's formula, written here once more with a module call for every layer.
"""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import flowseg_kernels as fk
from flowseg_kernels.ops.neural_field.reference import cosine_features

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
    """A decoder of 2 images of 8 x 8 pixels, 4 patches each; and its inputs."""
    torch.manual_seed(seed)
    decoder = fk.NeuralFieldDecoder(6, hidden=8, depth=2, patch_size=PATCH, max_freqs=2, **options)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return decoder, torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)


def algebra(decoder, x, s):
    """decoder(x, s) of the residual form, with a call of every layer."""
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
    """As PEFT's layers do, gives the base layer's weight and bias as its own and adds to the base layer's output."""

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
    """A wrapper subclass, as of quantised and of sharded weights: the value is the sum of two tensors that it holds."""

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
        # Custom ops would get the wrong data from a subclass that does not know them.
        assert op.namespace == "aten", op
        plain = torch.utils._pytree.tree_map_only(Sum, lambda v: v.a + v.b, args)
        return op(*plain, **(kwargs or {}))


def replaced(change):
    """A kind that puts change(layer) in the place of the layer."""

    def apply(decoder, path):
        parent, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(parent), name, change(decoder.get_submodule(path)))

    return apply


def changed(change):
    """A kind that calls change(layer)."""
    return lambda decoder, path: change(decoder.get_submodule(path))


def other_forward(layer):
    """As accelerate does, puts a forward of its own on the layer."""
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


KINDS = {
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
    """Outputs of two steps of descent, gradients of the inputs, and all parameters after it."""
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


def applied(kind, layer, **options):
    decoder, x, s = build(**options)
    torch.manual_seed(7)
    KINDS[kind](decoder, LAYERS[layer])
    return decoder, x, s


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_those_of_calling_every_layer(kind, layer, patch_chunk):
    decoder, x, s = applied(kind, layer, patch_chunk=patch_chunk)
    other, _, _ = applied(kind, layer)
    compare(two_steps(decoder, decoder, x, s), two_steps(lambda x, s: algebra(other, x, s), other, x, s))
    # The kind changes what the layer does, so the comparison says something.
    assert kind.startswith(("backward", "weight_norm")) or not torch.allclose(
        applied(kind, layer)[0](x, s), build()[0](x, s), rtol=1e-3
    )
