"""Sources, time samplers and ODE solvers."""

import math

import pytest
import torch

from flowseg.flow import integrate, make_source, sample_times


def test_an_image_source_is_the_image_followed_by_zeros():
    image = torch.rand(2, 3, 4, 5)
    assert make_source(image, 3) is image
    padded = make_source(image, 5)
    assert torch.equal(padded[:, :3], image) and not padded[:, 3:].any() and padded.shape == (2, 5, 4, 5)
    with pytest.raises(ValueError, match="at least 3"):
        make_source(image, 2)


def test_a_noise_source_is_reproducible_from_its_generator():
    image = torch.zeros(1, 3, 8, 8)
    first, second = (make_source(image, 2, "noise", torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1, 2, 8, 8) and 0.7 < first.std() < 1.3


def test_zero_fraction_is_the_share_of_exact_zeros():
    t = sample_times(4000, zero_fraction=0.5, generator=torch.Generator().manual_seed(0))
    assert abs(float((t == 0).float().mean()) - 0.5) < 0.03
    assert abs(float(t[t > 0].mean()) - 0.5) < 0.03
    assert not sample_times(7, zero_fraction=1.0).any()


def test_logit_normal_and_shift():
    def median(**options):
        return float(sample_times(4001, generator=torch.Generator().manual_seed(0), **options).median())

    assert abs(median(sampler="logit_normal") - 0.5) < 0.03
    assert abs(median(sampler="logit_normal", mean=1.0) - 1 / (1 + math.exp(-1))) < 0.03
    assert abs(median(sampler="uniform", shift=3.0) - 0.25) < 0.03
    with pytest.raises(ValueError, match="sampler"):
        sample_times(1, sampler="beta")


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_solvers_converge_at_their_order(method, order):
    # dx/dt = 2 t x has the solution x0 exp(t^2).
    def error(steps):
        x = integrate(
            lambda x, t: x * 2 * t[:, None, None, None],
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            steps=steps,
            method=method,
        )
        return abs(float(x) - math.e)

    # The float32 time of the network limits the error to about 1e-7.
    assert error(8) / error(16) == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_the_last_euler_step_returns_the_endpoint_prediction_itself(steps):
    outputs = []

    def network(x, t):
        outputs.append(torch.sin(7 * x) + t[0])
        return outputs[-1]

    x = integrate(network, torch.rand(2, 3, 4, 4), steps=steps, predicts="endpoint")
    assert x is outputs[-1] and len(outputs) == steps


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("predicts", ["endpoint", "velocity"])
def test_every_solver_is_exact_on_a_straight_flow(method, predicts):
    source, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    out = target if predicts == "endpoint" else target - source
    x, path = integrate(lambda x, t: out, source, steps=5, method=method, predicts=predicts, keep_path=True)
    torch.testing.assert_close(x, target, rtol=1e-5, atol=1e-5)
    assert [round(t, 6) for t, _ in path] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    torch.testing.assert_close(path[2][1], 0.6 * source + 0.4 * target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 101}, {"method": "rk4"}, {"predicts": "noise"}])
def test_wrong_arguments_are_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        integrate(lambda x, t: x, torch.zeros(1, 1, 1, 1), **bad)
