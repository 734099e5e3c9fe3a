"""The benchmarks' data sets: their layouts and label values on made-up trees, and on real samples where there are some."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowseg.config import DataConfig
from flowseg.data import open_data
from flowseg.data.class_names import COCO_STUFF, COCO_STUFF_UNUSED
from flowseg.data.datasets import resolve_labels
from flowseg.data.presets import voc_palette
from flowseg.data.transforms import augment, distort
from flowseg.errors import UserError

from .support.benchmarks import CASES, voc

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize("name", CASES)
def test_layout_and_label_values(name, tmp_path):
    make, raw, expected, classes = CASES[name]
    make(tmp_path, raw)
    data = open_data(DataConfig(name=name, root=tmp_path))
    assert data.num_classes == classes and len(data.train) == len(data.val) == 1
    for pairs in (data.train, data.val):
        image, labels = pairs[0]
        assert np.array(labels).tolist() == expected and image.size == labels.size


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("ade20k", 151, "values 151 are neither a class (1..150)"),
        ("cocostuff", 200, "values 200 are neither a class (171 values in 0..181)"),
        ("cityscapes", 40, "19 values in 7..33"),
        ("voc", 21, "values 21 are neither a class (0..20)"),
    ],
)
def test_foreign_values_are_named_with_their_file(name, bad, words, tmp_path):
    CASES[name][0](tmp_path, [[bad, 255]])
    with pytest.raises(UserError) as error:
        open_data(DataConfig(name=name, root=tmp_path))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and ".png" in str(error.value)
    # A large set is not decoded at the start; the value is an error all the same once it is read, never a silent 255.
    lazy = open_data(DataConfig(name=name, root=tmp_path, check="headers"))
    with pytest.raises(UserError, match=f"values {bad}"):
        lazy.train[0]


@pytest.mark.parametrize("name", CASES)
def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(UserError, match=r"data.root .* no such folder; it must contain"):
        open_data(DataConfig(name=name, root=tmp_path / "no"))
    CASES[name][0](tmp_path, [[8, 8]])
    with pytest.raises(UserError, match="data split 'tests'"):
        open_data(DataConfig(name=name, root=tmp_path, val_split="tests"))
    label = next(path for path in tmp_path.rglob("*.png") if "leftImg" not in path.name)
    label.write_bytes(label.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read as a label map"):
        open_data(DataConfig(name=name, root=tmp_path, check="headers"))
    label.unlink()
    with pytest.raises(UserError, match=f"no label map; wanted .*{label.name}"):
        open_data(DataConfig(name=name, root=tmp_path))


def test_voc_images_that_a_list_names_must_be_there(tmp_path):
    voc(tmp_path, [[0]])
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_1\n2007_2\n")
    with pytest.raises(UserError, match=r"2007_2.jpg: no such image; .*val.txt names it"):
        open_data(DataConfig(name="voc", root=tmp_path))


def test_class_lists_have_their_published_sizes():
    for name, count in (("ade20k", 150), ("cocostuff", 171), ("cityscapes", 19), ("voc", 21)):
        labels = resolve_labels(DataConfig(name=name))
        assert len(labels.classes) == len(set(labels.classes)) == len(labels.palette) == count
        assert len(set(labels.palette)) == count
    assert len(COCO_STUFF) == 182 and not {COCO_STUFF[k] for k in COCO_STUFF_UNUSED} & set(
        resolve_labels(DataConfig(name="cocostuff")).classes
    ) - {"door", "mirror", "window", "desk"}
    assert voc_palette(22)[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0)) and voc_palette(22)[15] == (192, 128, 128)


def test_a_class_may_not_cover_more_than_its_share():
    # Left three quarters one class, the rest another: most crops hold one class alone.
    labels = np.zeros((40, 160), np.uint8)
    labels[:, 120:] = 1
    image = Image.new("RGB", (160, 40))
    shares = {}
    for limit in (1.0, 0.75):
        config = DataConfig(height=40, width=40, max_class_share=limit)
        drawn = [augment(image, Image.fromarray(labels), config, np.random.default_rng(seed))[1] for seed in range(60)]
        shares[limit] = np.mean([np.bincount(t.numpy().ravel()).max() / t.numel() <= 0.75 for t in drawn])
    assert shares[1.0] < 0.4 and shares[0.75] > 0.8


def test_photometric_distortion_moves_colours_and_no_labels():
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 190, (24, 24, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    results = [np.asarray(distort(image, np.random.default_rng(seed))).astype(int) for seed in range(60)]
    untouched = sum((result == pixels).all() for result in results)
    # Four coins of one half.
    assert 0 < untouched < 15 and len({result.tobytes() for result in results}) > 40
    means = np.array([result.mean() for result in results])
    assert means.min() < 100 and means.max() > 150
    labels = Image.fromarray(rng.integers(0, 9, (24, 24)).astype(np.uint8))
    config = DataConfig(height=24, width=24, photometric=True)
    for seed in range(4):
        assert np.array_equal(
            augment(image, labels, config, np.random.default_rng(seed))[1].numpy(), np.asarray(labels)
        )


@pytest.mark.parametrize(
    ("name", "folder", "some"),
    [("camvid", "camvid", {3, 8}), ("ade20k", "ade20k", {0}), ("cocostuff", "cocostuff", {0})],
)
def test_real_samples(name, folder, some):
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"no samples of {name} beside the checkout ({root})")
    section = {"name": name, "root": root, "height": 64, "width": 64, "scale_max": 2.0, "max_class_share": 0.75}
    config = DataConfig(**section, photometric=True, flip=True)
    data = open_data(config, ("val",))
    seen = set()
    for index in range(min(len(data.val), 8)):
        image, labels = data.val[index]
        assert image.size == labels.size
        pixels, target = augment(image, labels, config, np.random.default_rng(index))
        values = set(np.unique(labels).tolist())
        assert set(target.unique().tolist()) <= values | {255} and pixels.shape == (3, 64, 64)
        seen |= values
    assert some <= seen and max(seen - {255}) < data.num_classes and len(seen) > 5
