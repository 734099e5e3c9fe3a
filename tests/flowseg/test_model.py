"""The network: shapes, sizes, conditioning, positions, and the published parameter counts."""

import pytest
import torch

from flowseg.config import ModelConfig
from flowseg.errors import UserError
from flowseg.model import FlowSegModel, build_model
from flowseg.model.blocks import rotary_table, rotate
from flowseg.model.sizes import resolve_size

from .tiny import TINY_MODEL, tiny_config


@pytest.mark.parametrize(("size", "millions"), [("L/16", 452), ("XL/16", 701)])
def test_parameter_counts_are_pixnerds(size, millions):
    with torch.device("meta"):
        model = FlowSegModel(resolve_size(ModelConfig(size=size)), condition_on_image=False)
    # PixNerd also embeds 1000 ImageNet classes.
    count = sum(p.numel() for p in model.parameters()) + 1000 * model.size.dim
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("stem", [0, 8])
@pytest.mark.parametrize("channels", [3, 5])
def test_shapes_and_gradients(stem, channels):
    config = tiny_config(model={**TINY_MODEL, "stem_width": stem}, codes={"channels": channels})
    model = build_model(config)
    x, image, t = torch.randn(2, channels, 16, 24), torch.randn(2, 3, 16, 24), torch.tensor([0.0, 0.7])
    out = model(x, t, image)
    assert out.shape == x.shape and not out.any()
    # Two zero-initialised layers keep gradients from the rest until they have moved.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model(x, t, image).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_time_image_and_state_all_matter():
    model = build_model(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, image, t = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16), torch.tensor([0.2])
        base = model(x, t, image)
        assert not torch.allclose(base, model(x, t + 0.5, image))
        assert not torch.allclose(base, model(x, t, -image))
        assert not torch.allclose(base, model(-x, t, image))


def test_unconditioned_model_takes_no_image():
    model = build_model(tiny_config(model={**TINY_MODEL, "condition_on_image": False}))
    assert model(torch.zeros(1, 3, 16, 16), torch.zeros(1)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="image must be given"):
        build_model(tiny_config())(torch.zeros(1, 3, 16, 16), torch.zeros(1))


def test_size_must_be_whole_patches():
    with pytest.raises(ValueError, match="divisible by the patch size 8, got 16x20"):
        build_model(tiny_config())(torch.zeros(1, 3, 16, 20), torch.zeros(1), torch.zeros(1, 3, 16, 20))


def test_wrong_size_names():
    with pytest.raises(UserError, match="did you mean 'nano'"):
        resolve_size(ModelConfig(size="nanno"))
    assert resolve_size(ModelConfig(size="L")) == resolve_size(ModelConfig(size="L/16"))
    with pytest.raises(UserError, match="multiple of 4"):
        resolve_size(ModelConfig(size="nano", dim=36, heads=6))


def test_rotation_keeps_length_and_depends_on_offsets_alone():
    table = rotary_table(5, 5, 8)
    x, y = torch.randn(8), torch.randn(8)
    at = [rotate(v.expand(1, 1, 25, 8), table)[0, 0] for v in (x, y)]
    torch.testing.assert_close(at[0].norm(dim=-1), x.norm().expand(25))
    score = at[0] @ at[1].T
    # One row down and two columns right, from two places.
    torch.testing.assert_close(score[0, 7], score[6, 13])
    assert abs(float(score[0, 7] - score[0, 11])) > 1e-4


def test_initial_weights_follow_the_seed_and_nothing_else():
    first = build_model(tiny_config()).state_dict()
    torch.rand(3)
    second = build_model(tiny_config(loss={"correction_weight": 0.0})).state_dict()
    third = build_model(tiny_config(train={"seed": 1})).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], third[k]) for k in first)
