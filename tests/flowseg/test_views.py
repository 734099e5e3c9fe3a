"""Labels of several views compared with the mean of whole maps of class probabilities, in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flowseg.data.transforms import model_size
from flowseg.inference import views
from flowseg.inference.views import Part, Taps, Views, after, cells, part_of, resizing
from flowseg.label_kinds import label_kind
from flowseg.segment import Segmenter
from flowseg_kernels import Codebook, kronecker_centroids

from .support.networks import Waves
from .test_evaluate import speckled
from .tiny import tiny_config


def segmenter_of(classes, channels=3, **sample):
    codes = kronecker_centroids(classes, channels)
    book = Codebook(codes, ignore_index=label_kind(classes).ignore)
    return Segmenter(Waves(), book, tiny_config(codes={"channels": channels}, sample=sample))


def probabilities(field, codebook):
    d = (field[:, None] - codebook.centroids[None, :, :, None, None]).square().sum(2)
    weight = 1 / (d + codebook.default_eps)
    return weight / weight.sum(1, keepdim=True)


def mean_of_windows(segmenter, image, mirrored):
    total = count = None
    for (rows, columns), field in segmenter._window_fields(image, mirrored):
        part = probabilities(field[None], segmenter.codebook)[0]
        if total is None:
            total = part.new_zeros(len(part), image.height, image.width)
            count = part.new_zeros(image.height, image.width)
        place = slice(rows.start, rows.start + part.shape[1]), slice(columns.start, columns.start + part.shape[2])
        total[:, place[0], place[1]] += part
        count[place] += 1
    return total / count


def plain_mean(segmenter, image):
    """The mean of maps of all classes, (K, h, w), at the size of the result."""
    sample, native = segmenter.config.sample, image.size[::-1]
    total = None
    for scale in sample.scales:
        size = model_size(native, segmenter.config.data, sample.resize, scale)
        seen = image.resize(size[::-1], Image.Resampling.BILINEAR) if size != native else image
        for mirrored in (False, True) if sample.flip else (False,):
            if sample.window == "slide":
                part = mean_of_windows(segmenter, seen, mirrored)
            else:
                part = probabilities(segmenter._whole_field(seen, mirrored)[None], segmenter.codebook)[0]
            part = part.flip(-1) if mirrored else part
            if total is None:
                total = part
            else:
                total = total + F.interpolate(part[None], size=total.shape[-2:], mode="bilinear", antialias=True)[0]
    if sample.upsample != "labels":
        total = F.interpolate(total[None], size=native, mode="bilinear")[0]
    return total / (len(sample.scales) * (1 + sample.flip))


def assert_likeliest(labels, mean):
    """Assert that labels are the most probable classes, up to the rounding of equal probabilities."""
    chosen = mean.gather(0, labels.long()[None])[0]
    assert (chosen >= mean.amax(0) - 2e-6).all()
    first, second = mean.topk(2, 0).values
    clear = first - second > 1e-5
    assert torch.equal(labels.long()[clear], mean.argmax(0)[clear]) and clear.float().mean() > 0.9


SAMPLES = {
    "flip": {"flip": True},
    "scales": {"scales": [1.0, 0.5, 1.75]},
    "scales to native": {"scales": [1.0, 1.5], "flip": True, "upsample": "probabilities"},
    "down to native": {"scales": [2.0, 1.0], "upsample": "codes"},
    "windows": {"window": "slide", "resize": "native", "stride": 0.4, "flip": True},
    "windows and scales": {"window": "slide", "resize": "native", "scales": [1.0, 1.3], "flip": True},
    "small windows": {"window": "slide", "resize": "cover", "scales": [0.5, 1.0], "upsample": "probabilities"},
    "probabilities": {"upsample": "probabilities"},
}


@pytest.mark.parametrize("classes", [11, 300])
@pytest.mark.parametrize("name", SAMPLES)
def test_labels_are_those_of_the_mean_of_all_maps(name, classes):
    segmenter = segmenter_of(classes, **SAMPLES[name])
    image = speckled(45, 58)
    # The program resizes with its own filter: use the same images in both.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flowseg.segment.resized", lambda picture, size: picture.resize(size[::-1], Image.Resampling.BILINEAR)
        )
        if segmenter.several_views:
            found = segmenter._labels_of_views(image, (45, 58))
            wanted = plain_mean(segmenter, image)
        else:
            seen = segmenter.seen(image)
            found = next(segmenter.native_labels([seen], (45, 58)))[0]
            field = segmenter.sample(segmenter._patched([seen]))[..., : seen.height, : seen.width]
            wanted = F.interpolate(probabilities(field, segmenter.codebook), size=(45, 58), mode="bilinear")[0]
    assert found.dtype == label_kind(classes).dtype and len(found.unique()) > 5
    size = wanted.shape[-2:]
    assert_likeliest(found if found.shape == size else segmenter_labels_at(found, size), wanted)


def segmenter_labels_at(labels, size):
    """Undo the repetition of nearest pixels."""
    rows, columns = ((torch.arange(new) + 0.5) * (old / new) for old, new in zip(labels.shape, size))
    return labels[rows.long()][:, columns.long()]


@pytest.mark.parametrize("numbers", [1, 300 * 7, None])
def test_a_device_without_a_search_for_equal_views_gives_the_same_labels(numbers):
    segmenter = segmenter_of(300, flip=True, scales=[1.0, 1.5])
    image = speckled(33, 40)
    wanted = segmenter.labels(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Views, "_decoded", lambda self, field: None)
        patch.setattr(Segmenter, "_views", property(lambda self: Views(self.codebook, None, numbers)))
        found = segmenter.labels(image)
    different = found != wanted
    assert different.float().mean() < 1e-3


def test_probabilities_are_computed_only_where_views_differ(monkeypatch):
    segmenter = segmenter_of(300, flip=True)
    pixels = []
    original = views.class_probabilities
    monkeypatch.setattr(
        views, "class_probabilities", lambda x, *a, **o: pixels.append(x.shape[-1]) or original(x, *a, **o)
    )
    field = segmenter.codebook.encode(torch.randint(0, 300, (1, 20, 30)))[0]
    other = field.clone()
    other[:, 3, 4:9] = segmenter.codebook.centroids[7, :, None]
    sides = [(slice(0, side), Taps(torch.arange(side)[:, None], torch.ones(side, 1))) for side in (20, 30)]
    parts = [iter([Part.of(part, *sides)]) for part in (field, other)]
    found = segmenter._views.labels(parts, (20, 30))
    # Five pixels of two views; none for the others.
    assert 0 < sum(pixels) <= 2 * 5
    same = torch.ones(20, 30, dtype=torch.bool)
    same[3, 4:9] = False
    assert torch.equal(found.long()[same], segmenter.codebook.decode(field[None])[0][same])


def test_a_pixel_that_reads_one_pixel_needs_no_probabilities(monkeypatch):
    segmenter = segmenter_of(300, upsample="probabilities")
    pixels, original = [], views.class_probabilities
    monkeypatch.setattr(
        views, "class_probabilities", lambda x, *a, **o: pixels.append(x.shape[-1]) or original(x, *a, **o)
    )
    # Six columns are made from two. The outer four read one of the two.
    field = segmenter.codebook.encode(torch.tensor([[[7, 9]]]))[0]
    labels = segmenter._resized_labels(field, (1, 6))
    assert labels.tolist() == [[7, 7, 7, 9, 9, 9]] and pixels == [2, 2]


def test_many_classes_need_no_map_of_all_classes():
    """The maps of all classes of this image would have 1.5 million numbers; no array has more than a million."""
    segmenter = segmenter_of(4000, channels=8, flip=True)
    views_of = Views(segmenter.codebook, None, 2**20)
    sizes = []
    original = views.class_probabilities

    def measured(*arguments, **options):
        found = original(*arguments, **options)
        sizes.append(found.numel())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "class_probabilities", measured)
        fields = [0.3 * torch.randn(8, 16, 24) for _ in range(2)]
        sides = [(slice(0, side), Taps(torch.arange(side)[:, None], torch.ones(side, 1))) for side in (16, 24)]
        found = views_of.labels([iter([Part.of(field, *sides)]) for field in fields], (16, 24))
    assert sizes and max(sizes) <= 2**20
    wanted = sum(probabilities(field[None], segmenter.codebook)[0] for field in fields)
    assert_likeliest(found, wanted / 2)


@pytest.mark.parametrize("old, new", [(7, 7), (7, 31), (31, 7), (30, 7), (1, 5), (5, 1), (64, 48), (50, 49)])
@pytest.mark.parametrize("antialias", [False, True])
def test_taps_are_those_of_interpolate(old, new, antialias):
    source = torch.randn(old, dtype=torch.float64)
    # Three equal columns: with one column, PyTorch 2.13 interpolates with antialias to other values.
    columns = source[None, None, :, None].repeat(1, 1, 1, 3)
    wanted = F.interpolate(columns, size=(new, 3), mode="bilinear", antialias=antialias)[0, 0, :, 0]
    taps = resizing(old, new, antialias=antialias)
    assert int(taps.index.min()) >= 0 and int(taps.index.max()) < old
    torch.testing.assert_close((source[taps.index] * taps.weight).sum(1), wanted, rtol=0, atol=1e-6)
    both = after(taps, resizing(new, 2 * new + 1))
    further = F.interpolate(wanted[None, None, :, None], size=(2 * new + 1, 1), mode="bilinear").flatten()
    torch.testing.assert_close((source[both.index] * both.weight).sum(1), further, rtol=0, atol=1e-6)


def test_parts_of_an_axis_add_up_to_the_axis():
    taps = after(resizing(20, 15, antialias=True), resizing(15, 40))
    places = [slice(0, 9), slice(6, 15), slice(11, 20)]
    count = torch.zeros(20)
    for place in places:
        count[place] += 1
    source = torch.randn(20)
    total = torch.zeros(40)
    for place in places:
        rows, some = part_of(taps, place, 1 / count)
        assert (some.weight >= 0).all() and int(some.index.max()) < 9 and int(some.index.min()) >= 0
        total[rows] += (source[place][some.index] * some.weight).sum(1)
    torch.testing.assert_close(total, (source[taps.index] * taps.weight).sum(1))


def test_cells_cut_at_every_border():
    whole = slice(0, 10)
    one = Part(torch.empty(0), slice(0, 6), whole, None, None)
    two = Part(torch.empty(0), slice(4, 12), slice(3, 7), None, None)
    found = list(cells([one, two], slice(2, 8), 10))
    rows, columns = [(2, 4), (4, 6), (6, 8)], [(0, 3), (3, 7), (7, 10)]
    assert found == [(slice(*r), slice(*c)) for r in rows for c in columns]


def test_nan_of_one_view_leaves_a_pixel_undecided():
    segmenter = segmenter_of(300)
    fields = [segmenter.codebook.centroids[3, :, None, None].repeat(1, 4, 5) for _ in range(2)]
    fields[1][:, 2, 1] = torch.nan
    sides = [(slice(0, side), Taps(torch.arange(side)[:, None], torch.ones(side, 1))) for side in (4, 5)]
    found = segmenter._views.labels([iter([Part.of(field, *sides)]) for field in fields], (4, 5))
    wanted = torch.full((4, 5), 3, dtype=torch.int32)
    wanted[2, 1] = 65535
    assert torch.equal(found, wanted)
