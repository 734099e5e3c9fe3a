"""The network: shapes, gradients, sizes, conditioning, positions, memory, and compilation."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from flowseg.config import ModelConfig
from flowseg.errors import UserError
from flowseg.model import build_model
from flowseg.model.blocks import rotary_table, rotate
from flowseg.model.sizes import resolve_size
from flowseg_kernels import Codebook, flow_interpolate, flow_loss, kronecker_centroids

from .tiny import TINY_MODEL, tiny_config


@pytest.mark.parametrize("stem", [0, 8])
@pytest.mark.parametrize("channels", [3, 5])
def test_shapes_and_gradients(stem, channels):
    config = tiny_config(model={**TINY_MODEL, "stem_width": stem}, codes={"channels": channels})
    model = build_model(config)
    x, image, t = torch.randn(2, channels, 16, 24), torch.randn(2, 3, 16, 24), torch.tensor([0.0, 0.7])
    out = model(x, t, image)
    assert out.shape == x.shape and not out.any()
    # Layers that start at zero block the gradients of other layers: fill them first.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model(x, t, image).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("stem, chunk", [(0, None), (8, None), (0, 2)])
def test_every_layer_is_called_as_a_module(stem, chunk):
    """Adapters, hooks, quantised and sharded layers rely on the call. The layers include the projector of REPA."""
    model = build_model(tiny_config(model={**TINY_MODEL, "stem_width": stem, "field_chunk": chunk}), align_dim=5)
    layers = {name: m for name, m in model.named_modules() if not list(m.children())}
    called = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, out, name=name: called.add(name))
    out, aligned = model(torch.zeros(1, 3, 16, 24), torch.zeros(1), torch.zeros(1, 3, 16, 24), align_after=1)
    assert out.shape == (1, 3, 16, 24) and aligned.shape == (1, 6, 5)
    assert called == set(layers)


def test_the_output_depends_on_time_image_and_state():
    model = build_model(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, image, t = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16), torch.tensor([0.2])
        base = model(x, t, image)
        assert not torch.allclose(base, model(x, t + 0.5, image))
        assert not torch.allclose(base, model(x, t, -image))
        assert not torch.allclose(base, model(-x, t, image))


def test_a_model_without_condition_needs_no_image():
    model = build_model(tiny_config(model={**TINY_MODEL, "condition_on_image": False}))
    assert model(torch.zeros(1, 3, 16, 16), torch.zeros(1)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="image must be given"):
        build_model(tiny_config())(torch.zeros(1, 3, 16, 16), torch.zeros(1))


def test_sizes_must_be_multiples_of_the_patch_size():
    with pytest.raises(ValueError, match="divisible by the patch size 8, got 16x20"):
        build_model(tiny_config())(torch.zeros(1, 3, 16, 20), torch.zeros(1), torch.zeros(1, 3, 16, 20))


def test_wrong_sizes_of_the_network_are_errors():
    with pytest.raises(UserError, match="did you mean 'nano'"):
        resolve_size(ModelConfig(size="nanno"))
    with pytest.raises(UserError, match=r"got 'huge'$"):
        resolve_size(ModelConfig(size="huge"))
    assert resolve_size(ModelConfig(size="L")) == resolve_size(ModelConfig(size="L/16"))
    with pytest.raises(UserError, match="multiple of 4"):
        resolve_size(ModelConfig(size="nano", dim=36, heads=6))


def test_rotation_keeps_length_and_scores_depend_only_on_offsets():
    table = rotary_table(5, 5, 8)
    x, y = torch.randn(8), torch.randn(8)
    at = [rotate(v.expand(1, 1, 25, 8), table)[0, 0] for v in (x, y)]
    torch.testing.assert_close(at[0].norm(dim=-1), x.norm().expand(25))
    score = at[0] @ at[1].T
    # The same offset (one row down, two columns right) from two positions.
    torch.testing.assert_close(score[0, 7], score[6, 13])
    assert abs(float(score[0, 7] - score[0, 11])) > 1e-4


def test_initial_weights_depend_only_on_the_seed():
    first = build_model(tiny_config()).state_dict()
    torch.rand(3)
    second = build_model(tiny_config(loss={"correction_weight": 0.0})).state_dict()
    third = build_model(tiny_config(train={"seed": 1})).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], third[k]) for k in first)


def network_and_inputs(**model):
    """A small network without zero layers, and its inputs."""
    built = build_model(tiny_config(model={**TINY_MODEL, **model}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(4)
    x, image = torch.randn(2, 2, 3, 16, 24, generator=generator)
    return built, (x, torch.tensor([0.1, 0.7]), image)


def saved_bytes(run):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return total


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"field_chunk": 2}])
def test_options_that_save_memory_keep_the_gradients(options):
    gradients, kept = [], []
    for given in ({}, options):
        model, inputs = network_and_inputs(**given, field_hidden=32)
        kept.append(saved_bytes(lambda m=model, i=inputs: m(*i)))
        model(*inputs).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert kept[1] < 0.9 * kept[0]


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True, "field_chunk": 4}])
def test_the_network_compiles_to_one_graph_that_contains_the_ops(options):
    model, (x, t, image) = network_and_inputs(**options)
    codebook = Codebook(kronecker_centroids(11))
    labels = torch.randint(0, 11, (2, 16, 24))

    def step(x, t, image, labels):
        x_t = flow_interpolate(x, labels, t, codebook)
        return flow_loss(model(x_t, t, image), x, labels, t, codebook, predicts="endpoint")

    expected = step(x, t, image, labels)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    got = torch.compile(step, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(
        x, t, image, labels
    )
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, list(model.parameters())), wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    inside = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("flowseg.flow_loss" in name for name in inside) and any(
        "flowseg.neural_field" in name for name in inside
    )


def test_attention_calls_pytorchs_fused_op(monkeypatch):
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v):
        shapes.append(q.shape)
        return original(q, k, v)

    monkeypatch.setattr("flowseg.model.blocks.F.scaled_dot_product_attention", record)
    model, inputs = network_and_inputs()
    model(*inputs)
    assert shapes == [(2, 2, 6, 16)] * 2


def test_positions_span_the_same_angles_at_every_resolution():
    small, large = rotary_table(4, 4, 16), rotary_table(7, 7, 16)
    corner = [table[:, [0, table.shape[1] - 1]] for table in (small, large)]
    torch.testing.assert_close(*corner)
    # Every second position of the larger grid is a position of the smaller one.
    torch.testing.assert_close(large.view(2, 7, 7, 8)[:, ::2, ::2].reshape(2, 16, 8), small)
