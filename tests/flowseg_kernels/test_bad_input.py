"""Every wrong argument is an error that names the argument, what was wanted and what came, the same on every backend."""

import pytest
import torch

import flowseg_kernels as fk

from ..support.samples import image_batch


@pytest.fixture
def good(codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    return {"prediction": x, "source": source, "labels": labels, "t": t, "centroids": codes150}


CASES = [
    ({"prediction": [1.0]}, TypeError, r"prediction: wanted a tensor \(B, C, H, W\); got list"),
    ({"prediction": torch.zeros(2, 3, 9, 13, dtype=torch.int32)}, TypeError, "prediction: wanted dtype .*; got int32"),
    (
        {"source": torch.zeros(2, 3, 9, 13).to_sparse()},
        TypeError,
        "source: wanted a dense tensor .*; got layout sparse_coo",
    ),
    ({"prediction": torch.zeros(3, 9, 13)}, ValueError, r"prediction: wanted shape \(B, C, H, W\); got \(3, 9, 13\)"),
    (
        {"source": torch.zeros(2, 3, 9, 12)},
        ValueError,
        r"source: wanted the shape of prediction, .*; got \(2, 3, 9, 12\)",
    ),
    ({"labels": torch.zeros(2, 9, 13)}, TypeError, "labels: wanted dtype uint8, int16, int32, int64; got float32"),
    ({"labels": torch.zeros(2, 9, 13, dtype=torch.uint16)}, TypeError, r"labels: .*; got uint16; call .int\(\)"),
    (
        {"labels": torch.zeros(2, 9, 14, dtype=torch.long)},
        ValueError,
        r"labels: wanted shape \(2, 9, 13\) to match prediction",
    ),
    ({"t": torch.zeros(3)}, ValueError, r"t: wanted shape \(2,\), one time for each image"),
    ({"t": 0.5}, TypeError, r"t: wanted a tensor \(B,\); got float"),
    ({"centroids": torch.zeros(150, 4)}, ValueError, "prediction: wanted 4 channels, as the centroids have"),
    ({"centroids": torch.zeros(0, 3)}, ValueError, "centroids: wanted at least one centroid"),
    ({"centroids": torch.zeros(150, 3, requires_grad=True)}, ValueError, "centroids: wanted fixed codes"),
    ({"centroids": torch.zeros(150, 3)}, ValueError, "eps: wanted a number above 0 for bare centroids"),
    ({"eps": 0.0}, ValueError, "eps: wanted a finite number above 0; got 0.0"),
    ({"eps": float("nan")}, ValueError, "eps: wanted a finite number above 0; got nan"),
    ({"temperature": -1.0}, ValueError, "temperature: wanted a finite number above 0; got -1.0"),
    ({"correction_weight": -1.0}, ValueError, "correction_weight: wanted a finite number of at least 0; got -1.0"),
    ({"max_norm": 0}, ValueError, "max_norm: wanted a finite number above 0; got 0"),
    ({"predicts": "noise"}, ValueError, "predicts: wanted one of 'velocity', 'endpoint'; got 'noise'"),
    ({"loss_space": "x"}, ValueError, "loss_space: wanted one of"),
    ({"schedule": "cosine"}, ValueError, "schedule: wanted one of 'static', 'annealed'; got 'cosine'"),
    ({"transform": "log"}, ValueError, "transform: wanted one of 'neg_log'"),
    ({"reduction": "avg"}, ValueError, "reduction: wanted one of 'mean', 'sum', 'none'; got 'avg'"),
    ({"labels": torch.zeros(2, 9, 13, dtype=torch.long, device="meta")}, ValueError, "labels: wanted it on cpu"),
]


@pytest.mark.parametrize("change, error, words", CASES, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_flow_loss_names_the_argument(good, change, error, words):
    with pytest.raises(error, match=words):
        fk.flow_loss(**{**good, **change})


@pytest.mark.parametrize("value", [150, 254, -1, 2**40])
@pytest.mark.parametrize(
    "name", ["flow_interpolate", "distance_correction", "flow_loss", "decode_confusion", "encode", "bwd"]
)
def test_label_out_of_range_is_named_with_its_place(backend, name, value, codes150):
    x, source, labels, t = image_batch(codes150.centroids, 2, 70, 90)
    calls = {
        "flow_interpolate": lambda y: fk.flow_interpolate(source, y, t, codes150),
        "distance_correction": lambda y: fk.distance_correction(x, y, codes150),
        "flow_loss": lambda y: fk.flow_loss(x, source, y, t, codes150),
        "decode_confusion": lambda y: fk.decode_confusion(x, y, codes150),
        "encode": codes150.encode,
        "bwd": lambda y: torch.ops.flowseg.flow_interpolate_bwd(
            x, source, y, t, codes150.centroids, None, 255, True, backend
        ),
    }
    labels[1, 60, 80] = labels[1, 61, 2] = value
    argument = "target" if name == "decode_confusion" and backend == "cpu" else "labels|target"
    words = rf"({argument}): wanted values in \[0, 150\) or ignore_index 255; got {value} at .*\(1, 60, 80\)"
    with pytest.raises(ValueError, match=words):
        calls[name](labels)


@pytest.mark.parametrize("time", [-0.1, 1.5, float("nan")])
def test_times_outside_the_path_are_named(backend, time, codes150):
    x, source, labels, t = image_batch(codes150.centroids)
    t[1] = time
    for call in (
        lambda: fk.flow_interpolate(source, labels, t, codes150),
        lambda: fk.flow_loss(x, source, labels, t, codes150),
    ):
        with pytest.raises(ValueError, match=r"t: wanted times in \[0, 1\]; got .* for image 1"):
            call()


def test_bare_centroids_do_not_silently_ignore_class_255(backend):
    mu = fk.kronecker_centroids(300, 3)
    x, labels = torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 255)
    with pytest.raises(
        ValueError, match="ignore_index: wanted a number, as the default 255 is one of these 300 classes"
    ):
        fk.distance_correction(x, labels, mu, eps=0.1)
    assert fk.distance_correction(x, labels, mu, eps=0.1, ignore_index=-1).abs().min() > 0
    with pytest.raises(TypeError, match="ignore_index: wanted an int; got float"):
        fk.distance_correction(x, labels, mu, eps=0.1, ignore_index=255.0)


def test_ignore_index_may_be_any_integer_and_any_class(backend):
    book = fk.Codebook(fk.kronecker_centroids(5, 3), ignore_index=-1)
    x = torch.randn(1, 3, 1, 2)
    labels = torch.tensor([[[-1, 2]]])
    assert not fk.distance_correction(x, labels, book)[..., 0].any()
    assert not fk.distance_correction(x, torch.tensor([[[0, 2]]]), book, ignore_index=0)[..., 0].any()
    with pytest.raises(ValueError, match="got 255"):
        fk.distance_correction(x, torch.tensor([[[255, 2]]], dtype=torch.uint8), book)


def test_one_class(backend):
    book = fk.Codebook(torch.tensor([[0.5, -0.5, 0.0]]))
    x, source, labels, t = image_batch(book.centroids)
    assert not fk.distance_correction(x, labels, book).any()
    loss = fk.flow_loss(x, source, labels, t, book)
    torch.testing.assert_close(loss, fk.flow_loss(x, source, labels, t, book, correction_weight=0))
    assert fk.nearest_centroid(x, book).sum() == 0 and fk.decode_confusion(x, labels, book).shape == (1, 1)


@pytest.mark.parametrize("dtype, words", [(torch.float32, "got torch.float32"), (torch.int8, "got torch.int8")])
def test_out_dtype_is_checked(codes150, dtype, words):
    with pytest.raises(TypeError, match=words):
        fk.nearest_centroid(torch.zeros(1, 3, 1, 1), codes150, out_dtype=dtype)


def test_more_channels_than_kernels_take_fall_back_or_are_an_error():
    book = fk.Codebook(fk.kronecker_centroids(9, 20))
    labels = torch.randint(0, 9, (1, 4, 5))
    assert torch.equal(book.decode(book.encode(labels)), labels)
    if "cpu" in fk.available_backends("nearest_centroid"):
        with (
            fk.use_backend("cpu"),
            pytest.raises(fk.BackendUnavailable, match="at most 16 code channels, these have 20"),
        ):
            book.decode(book.encode(labels))


@pytest.mark.parametrize(
    "change, error, words", [c for c in CASES if not {*c[0]} & {"prediction", "source", "labels", "t", "centroids"}]
)
def test_a_flow_loss_module_names_the_argument_when_it_is_made(codes19, change, error, words):
    with pytest.raises(error, match=words):
        fk.FlowLoss(codes19, **change)


def test_modules_take_the_keywords_of_their_functions_and_no_other(codes19):
    assert fk.FlowLoss.__init__.__kwdefaults__ == fk.flow_loss.__kwdefaults__
    assert fk.CentroidDecoder.__init__.__kwdefaults__ == fk.nearest_centroid.__kwdefaults__
    for module in (fk.FlowLoss, fk.CentroidDecoder):
        with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
            module(codes19, weight=1.0)
    with pytest.raises(TypeError, match=r"out_dtype: wanted uint8, int16, int32 or int64; got torch\.float32"):
        fk.CentroidDecoder(codes19, out_dtype=torch.float32)
    assert repr(fk.FlowLoss(codes19, max_norm=2.0)).startswith("FlowLoss(\n  max_norm=2.0\n")
