"""Numbers that change between calls are never stale: Python and NumPy numbers and tensors of one element, eager and compiled."""

import inspect

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import flowseg_kernels as fk
from flowseg_kernels.runtime import checks

from .steps import batch

LOSS = ("correction_weight", "temperature", "eps", "max_norm", "t_min")


def inputs(codes):
    source, labels, t = batch(codes, 2, 8, 12)
    return torch.rand_like(source) * 2 - 1, source, labels, t * 0.999


def programs(codes):
    x, source, labels, t = inputs(codes)
    loss = {"predicts": "endpoint", "loss_space": "velocity"}
    return {
        "a weight beside a product": lambda w: fk.flow_loss(x * w, source, labels, t, codes, correction_weight=w + 0.1),
        "all of the loss": lambda w: fk.flow_loss(
            x, source, labels, t, codes, **loss, correction_weight=w, temperature=w + 1, eps=w / 9, max_norm=w * 3, t_min=w / 3
        ),
        "all of the correction": lambda w: fk.distance_correction(
            x * w, labels, codes, temperature=w + 1, eps=w / 10 + 0.01, max_norm=w + 0.1
        ),
    }  # fmt: skip


def test_the_known_defaults_are_those_of_the_signatures():
    for function in (fk.distance_correction, fk.flow_loss, fk.FlowLoss):
        parameters = inspect.signature(function).parameters
        numbers = checks._DEFAULTS.keys() & parameters.keys()
        assert len(numbers) >= 3 and all(parameters[name].default == checks._DEFAULTS[name] for name in numbers)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["a weight beside a product", "all of the loss", "all of the correction"])
def test_compiled_code_uses_the_number_of_each_call(name, dynamic, codes19):
    function = programs(codes19)[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for k in range(1, 12):
        torch.testing.assert_close(compiled(k / 7), function(k / 7), rtol=1e-5, atol=1e-6)
    # One graph for the first number, one for the default weight of 1, and one for all others.
    assert counters["stats"]["unique_graphs"] <= 3


def test_code_compiled_by_inductor_uses_the_number_of_each_call(codes19):
    function = programs(codes19)["a weight beside a product"]
    torch._dynamo.reset()
    # dynamic=True: one graph for all numbers.
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for k in (1, 3, 5):
        torch.testing.assert_close(compiled(k / 7), function(k / 7), rtol=1e-5, atol=1e-6)


def test_a_tensor_of_one_element_compiles_once(codes19):
    function = programs(codes19)["all of the loss"]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for k in range(1, 8):
        torch.testing.assert_close(compiled(torch.tensor(k / 7, dtype=torch.float64)), function(k / 7))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_numbers_out_of_range_are_named(codes19):
    compiled = torch.compile(programs(codes19)["all of the loss"], fullgraph=True, backend="aot_eager")
    for value, words in (
        (-1.0, "correction_weight: wanted .* at least 0; got -1"),
        (float("nan"), "correction_weight"),
    ):
        with pytest.raises(ValueError, match=words):
            compiled(torch.tensor(value))


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.float64, lambda v: torch.tensor(v).double()])
def test_every_kind_of_number_is_a_number(backend, kind, codes19):
    for name, function in programs(codes19).items():
        value = kind(0.625)
        assert torch.equal(function(value), function(0.625)), name


@pytest.mark.parametrize("name", LOSS)
@pytest.mark.parametrize(
    "value, error, words",
    [
        (torch.tensor(0.5, requires_grad=True), ValueError, "wanted a number that needs no gradient"),
        (torch.tensor([0.5]), ValueError, r"wanted a number, or a floating tensor of shape \(\); got \(1,\)"),
        (torch.tensor(1), ValueError, "wanted a number, or a floating tensor"),
        ("0.5", TypeError, "wanted a number( or None)?; got str"),
        (torch.tensor(-1.0), ValueError, "wanted a finite number"),
        (torch.tensor(torch.nan), ValueError, "wanted a finite number"),
        (float("inf"), ValueError, "wanted a finite number"),
        (10**400, ValueError, "wanted a finite number"),
        (np.array([0.5]), TypeError, "wanted a number"),
        (1j, TypeError, "wanted a number"),
        (np.complex64(1), TypeError, "wanted a number"),
    ],
)
def test_a_wrong_number_is_named(name, value, error, words, codes19):
    x, source, labels, t = inputs(codes19)
    with pytest.raises(error, match=f"^{name}: {words}"):
        fk.flow_loss(x, source, labels, t, codes19, **{name: value})


def test_vmap_takes_a_number_per_example(codes19):
    x, source, labels, t = inputs(codes19)
    weights = torch.tensor([0.2, 0.9])

    def loss(x, weight):
        return fk.flow_loss(x, source, labels, t, codes19, correction_weight=weight)

    got = torch.func.vmap(loss, in_dims=(None, 0))(x, weights)
    assert torch.equal(got, torch.stack([loss(x, w) for w in weights]))


def test_modules_take_tensors_for_schedules(codes19):
    x, source, labels, t = inputs(codes19)
    weight = torch.tensor(0.0)
    module = fk.FlowLoss(codes19, correction_weight=weight)
    for value in (0.0, 0.4, 1.0):
        weight.fill_(value)
        want = fk.flow_loss(x, source, labels, t, codes19, correction_weight=value)
        assert torch.equal(module(x, source, labels, t), want)


def test_vanilla_flow_matching_compiles_with_bare_codes(codes19):
    x, source, labels, t = inputs(codes19)

    def loss(x):
        return fk.flow_loss(x, source, labels, t, codes19.centroids, correction_weight=0.0)

    assert torch.equal(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x))


def test_a_module_with_a_number_of_numpy_compiles(codes19):
    x, source, labels, t = inputs(codes19)
    module = fk.FlowLoss(codes19, correction_weight=np.float64(0.3))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, source, labels, t), module(x, source, labels, t))


def test_numpy_integers_are_integers(backend, codes19):
    x, source, labels, t = inputs(codes19)
    book = fk.Codebook(codes19.centroids, ignore_index=np.int64(-1))
    assert book.ignore_index == -1 and type(book.ignore_index) is int
    got = fk.flow_loss(x, source, labels, t, book, ignore_index=np.uint8(255))
    assert torch.equal(got, fk.flow_loss(x, source, labels, t, book, ignore_index=255))
    for wrong in (True, 1.0, torch.tensor(1), "1"):
        with pytest.raises(TypeError, match="ignore_index: wanted an int"):
            fk.flow_loss(x, source, labels, t, book, ignore_index=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_times_beyond_the_ends_by_rounding(backend, dtype, codes19):
    """linspace and sums of steps give such times. Farther out they are an error."""
    x, source, labels, _ = inputs(codes19)
    eps = torch.finfo(dtype).eps
    near = torch.tensor([1 + eps, -eps], dtype=dtype)
    got = fk.flow_interpolate(source, labels, near, codes19)
    want = fk.flow_interpolate(source, labels, torch.tensor([1.0, 0.0], dtype=dtype), codes19)
    torch.testing.assert_close(got, want, rtol=0, atol=4 * eps)
    assert fk.flow_loss(x, source, labels, near, codes19, predicts="endpoint", loss_space="velocity").isfinite()
    for far in (1 + 3 * eps, -3 * eps):
        with pytest.raises(ValueError, match=r"t: wanted times in \[0, 1\]"):
            fk.flow_interpolate(source, labels, torch.tensor([far, 0.5], dtype=dtype), codes19)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bare_centroids_that_are_not_finite_are_named(value, codes19):
    x, source, labels, t = inputs(codes19)
    mu = codes19.centroids.clone()
    mu[3, 1] = value
    calls = (
        lambda: fk.nearest_centroid(x, mu),
        lambda: fk.decode_confusion(x, labels, mu),
        lambda: fk.distance_correction(x, labels, mu, eps=0.1),
        lambda: fk.flow_loss(x, source, labels, t, mu, eps=0.1),
        lambda: fk.flow_interpolate(source, labels, t, mu),
    )
    for name in ("reference", "cpu"):
        for call in calls:
            with (
                fk.use_backend(name),
                pytest.raises(ValueError, match="centroids: wanted finite values; got NaN or inf"),
            ):
                call()


def test_nan_among_many_bare_centroids_decodes_to_no_class(backend):
    mu = fk.kronecker_centroids(300)
    x = torch.full((1, 3, 1, 2), torch.nan)
    x[..., 1] = mu[255, :, None]
    assert fk.nearest_centroid(x, mu).tolist() == [[[-1, 255]]]
    assert fk.nearest_centroid(x, mu, ignore_index=1000).tolist() == [[[1000, 255]]]
    assert fk.nearest_centroid(x, mu[:255]).flatten()[0] == 255
    with pytest.raises(ValueError, match="out_dtype: wanted one that holds classes up to 255 and ignore_index -1"):
        fk.nearest_centroid(x, mu[:256], out_dtype=torch.uint8)
