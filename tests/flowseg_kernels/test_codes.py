"""Sequences of codes, and Codebook without tools around it."""

import copy
import dataclasses
import io
import math
import pickle
import warnings

import pytest
import torch

import flowseg_kernels as fk
from flowseg_kernels.decode_grid import build_decode_grid
from flowseg_kernels.decode_guesses import build_decode_guesses
from flowseg_kernels.derived import derived_from, smallest_distance

from ..support.samples import decode_tables


def test_kronecker_codes_by_hand():
    points = [[math.fmod(k * math.sqrt(p), 1) for p in (2, 3)] for k in (1, 2, 3)]
    want = torch.tensor(points, dtype=torch.float64)
    want = 2 * (want - want.amin(0)) / (want.amax(0) - want.amin(0)) - 1
    torch.testing.assert_close(fk.kronecker_centroids(3, 2, dtype=torch.float64), want)


@pytest.mark.parametrize(
    "codes, distance",
    [
        (fk.kronecker_centroids(150, 3), 0.154),
        (fk.kronecker_centroids(150, 3, sequence="r_sequence"), 0.226),
        (fk.grid_centroids(150, 3), 0.4),
    ],
)
def test_smallest_distances_known_from_the_method(codes, distance):
    assert smallest_distance(codes) == pytest.approx(distance, abs=5e-4)


@pytest.mark.parametrize("classes, channels", [(11, 3), (150, 3), (150, 8), (700, 4)])
def test_searched_codes_are_the_best_sequence_and_repeatable(classes, channels):
    searched = fk.kronecker_centroids(classes, channels, sequence="searched")
    torch.testing.assert_close(searched, fk.kronecker_centroids(classes, channels, sequence="searched"), rtol=0, atol=0)
    for other in ("sqrt_primes", "r_sequence"):
        assert smallest_distance(searched) >= smallest_distance(
            fk.kronecker_centroids(classes, channels, sequence=other)
        )


@pytest.mark.parametrize("channels", range(1, 17))
@pytest.mark.parametrize("make", [fk.kronecker_centroids, fk.grid_centroids])
def test_codes_fill_the_box_for_any_channels(make, channels):
    for classes in (1, 2, 37):
        codes = make(classes, channels)
        assert codes.shape == (classes, channels) and codes.dtype == torch.float32
        assert codes.abs().max() <= 1 and codes.unique(dim=0).shape[0] == classes


@pytest.mark.parametrize("make", [fk.kronecker_centroids, fk.grid_centroids])
def test_counts_are_whole_numbers(make):
    with pytest.raises(TypeError, match="num_classes: wanted an int; got float"):
        make(1.5)
    with pytest.raises(TypeError, match="channels: wanted an int; got float"):
        make(3, 2.0)
    with pytest.raises(ValueError, match="num_classes: wanted 1 to 65536; got 0"):
        make(0)


def test_most_classes_with_a_decode_grid():
    book = fk.Codebook(fk.kronecker_centroids(65536, 3), ignore_index=-1)
    assert book.num_classes == 65536
    labels = torch.randint(0, 65536, (1, 40, 50))
    assert torch.equal(book.decode(book.encode(labels)), labels)


@pytest.mark.parametrize("classes", [1, 2, 150, 1024, 1025])
def test_words_of_the_grid_name_what_its_lists_do(classes):
    (cells, records, records_left), _, _ = decode_tables(fk.kronecker_centroids(classes, 3))
    cell, word = cells.flatten(1)
    if classes > 1024:
        assert torch.equal(cell, word)
        return
    named = torch.stack((word & 1023, word >> 10 & 1023, word >> 20), dim=1)
    single, short, long = cell >= 0, (cell < 0) & (word >= 0), word < 0
    assert torch.equal(named[single], cell[single, None].expand(-1, 3))
    assert torch.equal(word[long], cell[long]) and (records[-1 - cell[long]][:, 3, 3] >= 0).all()
    listed = records[-1 - cell[short]][:, 3]
    assert (records_left[-1 - cell[short]] == 1).all() and (listed[:, 3:] < 0).all()
    # A list with fewer than three classes repeats its last class.
    assert torch.equal(
        named[short].float(), torch.where(listed[:, :3] >= 0, listed[:, :3], listed.amax(1, keepdim=True))
    )


def test_lists_of_order_two_hold_both_nearest_codes():
    codes = fk.kronecker_centroids(40, 3)
    codes = torch.cat((codes, codes[:4], codes[:2]))
    (cells, records, records_left), low, scale = decode_tables(codes, margin=True)
    assert torch.equal(cells[0], cells[1]) and (cells < 0).all()
    points = codes[torch.randint(0, len(codes), (2000,))] + 0.2 * torch.randn(2000, 3)
    cell = ((points - low) * scale).long()
    points, cell = points[(cell < cells.shape[-1]).all(1)], cell[(cell < cells.shape[-1]).all(1)]
    first = -1 - cells[0][cell[:, 2], cell[:, 1], cell[:, 0]].long()
    d = (points[:, None].double() - codes.double()).square().sum(2)
    for record, nearest in zip(first.tolist(), d.sort(dim=1, stable=True).indices[:, :2].tolist()):
        listed = records[record : record + records_left[record], 3].flatten()
        listed = listed[listed >= 0].int().tolist()
        assert listed == sorted(listed) and set(nearest) <= set(listed)
        assert not {44, 45} & set(listed)  # two equal codes come before them


def test_many_equal_codes_have_short_lists():
    (_, records, _), _, _ = decode_tables(torch.ones(500, 3), margin=True)
    assert len(records) == 1 and records[0, 3].tolist() == [0, 1, *[-1] * 6]


def test_no_grid_where_squared_distances_would_overflow():
    codes = 1e19 * fk.kronecker_centroids(20, 3)
    assert not decode_tables(codes)[0] and not decode_tables(codes, margin=True)[0]


@pytest.mark.parametrize("codes", ["kronecker", "lattice", "doubled", "far", "tiny"])
@pytest.mark.parametrize("classes, channels", [(24, 4), (33, 8), (34, 8), (500, 5), (2500, 16)])
def test_certain_distances_of_guesses_are_lower_bounds(codes, classes, channels):
    mu = fk.kronecker_centroids(classes, channels)
    mu = {
        "kronecker": mu,
        "lattice": torch.randint(-2, 3, (classes, channels)).float(),
        "doubled": mu[: classes // 2].repeat(3, 1)[:classes],
        "far": 1000 + mu,
        "tiny": 1e-17 * mu,
    }[codes]
    _, _, _, rivals, certain = decode_tables(mu)[0]
    d = torch.cdist(mu.double(), mu.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    d.fill_diagonal_(math.inf)
    assert rivals.shape == (classes, min(32, classes - 1)) and certain.shape == (classes, rivals.shape[1] + 1)
    for j in range(certain.shape[1]):
        nearest_other = d.amin(1) / 4
        # The slack covers the rounding of a squared fp32 distance, (C + 3) 2^-24, on both sides.
        assert (certain[:, j].double() <= nearest_other * (1 - 2 * (channels + 3) * 2.0**-24)).all()
        if codes == "kronecker":
            assert (certain[:, j].double() >= nearest_other.nan_to_num(posinf=0) * (1 - 1e-4)).all()
        if j < rivals.shape[1]:
            d.scatter_(1, rivals[:, j : j + 1].long(), math.inf)


@pytest.mark.parametrize("classes, channels", [(24, 4), (150, 5), (1000, 8), (5000, 16)])
def test_cells_of_guesses_list_their_codes(classes, channels):
    mu = fk.kronecker_centroids(classes, channels)
    projection, starts, members = decode_tables(mu)[0][:3]
    axes = len(projection)
    cells = round((len(starts) - 1) ** (1 / axes))
    assert cells**axes == len(starts) - 1 and starts[0] == 0 and starts[-1] == len(members)
    assert (starts.diff() >= 0).all() and members.min() >= 0 and members.max() < classes
    position = (mu @ projection[:, :-1].T + projection[:, -1]).clamp(0, cells - 1).long()
    own = (position * cells ** torch.arange(axes)).sum(1)
    found = [k in members[starts[n] : starts[n + 1]].tolist() for k, n in enumerate(own.tolist())]
    assert sum(found) > 0.99 * classes


@pytest.mark.parametrize("classes, channels", [(1, 3), (60, 3), (60, 8), (300, 4)])
def test_tables_do_not_depend_on_the_default_dtype(classes, channels):
    mu = fk.kronecker_centroids(classes, channels)
    for order in (1, 2):

        def build(order=order):
            found = build_decode_grid(mu, order) if channels == 3 else build_decode_guesses(mu)
            return [v for v in dataclasses.astuple(found) if isinstance(v, torch.Tensor)]

        want = build()
        torch.set_default_dtype(torch.float64)
        try:
            got = build()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want))


def test_a_few_pixels_among_many_codes_build_no_tables():
    mu = fk.kronecker_centroids(2500, 8)
    book = fk.Codebook(mu, ignore_index=-1)
    derived = derived_from(book.centroids)
    labels = torch.randint(0, 2500, (1, 50, 30))
    small = book.encode(labels[:, :8, :8])
    with fk.use_backend("cpu" if "cpu" in fk.available_backends("nearest_centroid") else "reference"):
        assert torch.equal(book.decode(small), labels[:, :8, :8])
        assert not derived._cached
        for _ in range(2):
            assert torch.equal(book.decode(book.encode(labels)), labels)
    if "cpu" in fk.available_backends("nearest_centroid"):
        assert "decode guesses" in derived._cached


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 16, 20])
def test_other_channels_decode_without_a_grid(channels):
    book = fk.Codebook(fk.kronecker_centroids(64, channels))
    labels = torch.randint(0, 64, (2, 5, 6))
    assert book.grid[0] is None
    assert torch.equal(book.decode(book.encode(labels)), labels)


def test_smallest_distance_equals_all_pairs():
    codes = torch.randn(300, 5)
    d = (codes[:, None].double() - codes[None].double()).square().sum(2).sqrt()
    d.fill_diagonal_(math.inf)
    assert smallest_distance(codes) == pytest.approx(float(d.min()), rel=1e-12)


def test_codebook_survives_casts_moves_copies_and_saving(codes150):
    book = copy.deepcopy(codes150)
    labels = torch.randint(0, 150, (1, 8, 8))
    for changed in (book.half(), book.bfloat16(), book.to(torch.float64), pickle.loads(pickle.dumps(book))):
        assert changed.centroids.dtype == torch.float32
        assert torch.equal(changed.centroids, codes150.centroids)
        assert torch.equal(changed.decode(changed.encode(labels)), labels)
    file = io.BytesIO()
    torch.save(book.state_dict(), file)
    file.seek(0)
    other = fk.Codebook(fk.kronecker_centroids(7, 2), ignore_index=-1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.num_classes, other.channels, other.ignore_index) == (150, 3, 255)
    assert other.min_distance == codes150.min_distance and torch.equal(other.decode(other.encode(labels)), labels)
    assert not hasattr(book.to("meta").centroids, "nothing") and book.centroids.device.type == "meta"


def test_pickles_with_the_former_module_of_codebook_load(codes19):
    former = pickle.dumps(codes19, protocol=2).replace(b"flowseg_kernels.codebook\n", b"flowseg_kernels.codes\n")
    assert b"flowseg_kernels.codes\nCodebook" in former
    book = pickle.loads(former)
    assert type(book) is fk.Codebook and torch.equal(book.centroids, codes19.centroids)


def test_state_dict_holds_tensors_only_and_loads_into_meta(codes150):
    from safetensors.torch import load, save

    state = load(save(fk.FlowLoss(codes150).state_dict()))
    with torch.device("meta"):
        module = fk.FlowLoss(fk.Codebook(fk.kronecker_centroids(7, 2), ignore_index=-1))
    for empty in (module, copy.deepcopy(module).to("meta")):
        empty.load_state_dict(state, assign=True)
        book = empty.codebook
        assert (book.num_classes, book.ignore_index, book.centroids.device.type) == (150, 255, "cpu")
        assert torch.equal(
            book.decode(book.encode(torch.arange(150).view(1, 10, 15))), torch.arange(150).view(1, 10, 15)
        )
    with pytest.raises(ValueError, match="centroids: wanted values; got a meta tensor"):
        fk.Codebook(torch.zeros(3, 3, device="meta"))


def test_codes_that_coincide_or_cluster_are_cheap_and_right(backend):
    same = fk.Codebook(torch.zeros(150, 3))
    assert same.min_distance == 0 and same.default_eps > 0 and not same.decode(torch.randn(1, 3, 4, 4)).any()
    cluster = torch.cat((1e-6 * torch.randn(149, 3), torch.ones(1, 3)))
    book = fk.Codebook(cluster)
    labels = torch.arange(150).view(1, 10, 15)
    assert torch.equal(book.decode(book.encode(labels)), labels)
    assert all(v.numel() < 1 << 24 for v in decode_tables(book.centroids)[0])


def test_codes_that_coincide_are_a_warning_once():
    book = fk.Codebook(torch.full((5, 3), 0.1875))
    with pytest.warns(UserWarning, match="two of its codes coincide"):
        assert book.default_eps > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert book.default_eps > 0


def test_a_codebook_can_be_made_inside_any_use_backend_block():
    with fk.use_backend("cuda"):
        assert fk.Codebook(fk.kronecker_centroids(3000, 3), ignore_index=-1).min_distance > 0


def test_default_eps_is_a_fifth_of_the_squared_spacing(codes150):
    assert codes150.default_eps == pytest.approx(0.2 * codes150.min_distance**2)
    assert fk.Codebook(torch.zeros(1, 3)).min_distance == math.inf


def test_encode_marks_ignored_and_takes_every_label_dtype(codes150, backend):
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        labels = torch.tensor([[[0, 255, 149]]], dtype=dtype)
        codes = codes150.encode(labels)
        assert codes.shape == (1, 3, 1, 3)
        assert torch.equal(codes[0, :, 0, 0], codes150.centroids[0]) and not codes[0, :, 0, 1].any()


def test_an_ignored_class_is_a_warning():
    with pytest.warns(UserWarning, match="ignore_index 255 is also one of its 300 classes"):
        fk.Codebook(fk.kronecker_centroids(300, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.Codebook(fk.kronecker_centroids(300, 3), ignore_index=-1)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: fk.kronecker_centroids(0), ValueError, "num_classes: wanted 1 to 65536; got 0"),
        (lambda: fk.kronecker_centroids(70000), ValueError, "num_classes"),
        (lambda: fk.grid_centroids(3, 0), ValueError, "channels: wanted at least 1; got 0"),
        (lambda: fk.kronecker_centroids(3, sequence="halton"), ValueError, "sequence: wanted .*; got 'halton'"),
        (lambda: fk.Codebook([[0.0]]), TypeError, "centroids: wanted a .* tensor; got list"),
        (lambda: fk.Codebook(torch.zeros(3)), ValueError, r"centroids: wanted shape \(K, C\)"),
        (lambda: fk.Codebook(torch.zeros(3, 3, dtype=torch.long)), TypeError, "centroids: wanted a floating dtype"),
        (lambda: fk.Codebook(torch.full((3, 3), math.nan)), ValueError, "centroids: wanted finite values"),
        (lambda: fk.Codebook(torch.zeros(3, 3), ignore_index=1.5), TypeError, "ignore_index: wanted an int"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
