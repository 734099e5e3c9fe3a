"""Generated scenes, folders of images and labels, augmentation, and reproducible batches."""

import colorsys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from flowseg.config import DataConfig, load_config
from flowseg.data import open_data, training_batches
from flowseg.data.catalog import DATA_SETS
from flowseg.data.datasets import resolve_labels
from flowseg.data.digits import DigitScenes, _digits
from flowseg.data.folder import read_image
from flowseg.data.paint_classes import COLORS, SECONDS, textured
from flowseg.data.paints import PAINTS, PaintScenes, class_names
from flowseg.data.presets import spread_palette
from flowseg.data.textures import TEXTURES
from flowseg.data.transforms import augment, model_size, prepare
from flowseg.data_names import DATA_NAMES
from flowseg.errors import DataWarning, UserError

from .tiny import folder_section, tiny_config


@pytest.mark.parametrize(("kind", "classes"), [(DigitScenes, 11), (PaintScenes, 48)])
def test_scenes_are_reproducible_and_contain_most_classes(kind, classes):
    scenes = kind("train", 40, 64, 48, seed=3)
    image, labels = scenes[4]
    again, labels_again = kind("train", 99, 64, 48, seed=3)[4]
    assert np.array_equal(image, again) and np.array_equal(labels, labels_again)
    assert not np.array_equal(image, kind("train", 40, 64, 48, seed=4)[4][0])
    assert not np.array_equal(image, kind("val", 40, 64, 48, seed=3)[4][0])
    assert image.size == labels.size == (48, 64) and image.mode == "RGB"
    seen = np.unique(np.concatenate([np.unique(scenes[i][1]) for i in range(len(scenes))]))
    assert seen.max() < classes and len(seen) > 0.8 * classes


def test_the_mean_color_tells_most_paints_apart():
    # Classify regions by the nearest mean colour of other scenes: the task must be learnable but not trivial.
    def means(split, count):
        found = {}
        for image, labels in (PaintScenes(split, count, 48, 48)[index] for index in range(count)):
            pixels, labels = np.asarray(image, np.float32), np.asarray(labels)
            for k in np.unique(labels):
                if (labels == k).sum() > 100:
                    found.setdefault(int(k), []).append(pixels[labels == k].mean(0))
        return found

    known = {k: np.mean(colors, 0) for k, colors in means("train", 150).items()}
    assert len(known) == len(PAINTS)
    asked = [(k, color) for k, colors in means("val", 40).items() for color in colors]
    right = [k == min(known, key=lambda c: np.square(known[c] - color).sum()) for k, color in asked]
    assert 0.7 < np.mean(right) < 1


def earlier_paints(split, index, height, width, seed):
    """A scene of 48 paints, written as in the first version."""
    rng = np.random.default_rng((seed, ("train", "val").index(split), index))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    points = rng.uniform((0, 0), (height, width), (rng.integers(3, 8), 2))
    cell = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    canvas, labels = np.empty((height, width, 3), np.float32), np.empty((height, width), np.uint8)
    for place in range(len(points)):
        labels[cell == place] = paint = int(rng.integers(48))
        brightness, saturation, hue = (0.45, 0.85)[paint // 24], (0.4, 0.9)[paint // 12 % 2], paint % 12
        hue = (hue + rng.uniform(-0.4, 0.4)) / 12 % 1.0
        color = colorsys.hsv_to_rgb(hue, saturation + rng.uniform(-0.1, 0.1), brightness + rng.uniform(-0.1, 0.1))
        angle = rng.uniform(0, np.pi)
        inside = cell == place
        along = x[inside] * np.cos(angle) + y[inside] * np.sin(angle)
        along = along * (2 * np.pi / rng.uniform(4.0, 12.0))
        wave = 1 + rng.uniform(0.1, 0.4) * np.sin(along + rng.uniform(0, 2 * np.pi))
        canvas[inside] = wave[:, None] * np.array(color, np.float32)
    canvas += rng.normal(0.0, 0.06, canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), labels


def test_the_48_paints_are_bit_for_bit_those_of_the_first_version():
    for split, seed in (("train", 0), ("val", 7)):
        data = open_data(DataConfig(name="paints", height=40, width=56), (split,), seed=seed)
        pairs = getattr(data, split)
        for index in (0, 1, 199):
            for found, wanted in zip(pairs[index], earlier_paints(split, index, 40, 56, seed)):
                assert np.array_equal(found, wanted)
    assert data.num_classes == 48 and data.labels.classes[::47] == ("dark pale red", "light strong rose")
    assert data.labels.palette == spread_palette(48)


def test_paints_have_any_number_of_classes_with_distinct_names():
    names = class_names(65535)
    assert len(set(names)) == 65535
    assert names[:1000] == class_names(1000) and class_names(20) == class_names(48)[:20]
    assert names[0] == "dark pale red, medium upright stripes"
    assert names[-1] == "clear pale azure, wide straight grid in bright mint"
    assert class_names(49)[48] == "dark strong red" and len(set(class_names(288))) == 288
    assert sum(name.endswith("in white") for name in names) == 288 * 30
    for count, mode in ((2, "L"), (20, "L"), (255, "L"), (256, "I"), (65535, "I")):
        data = open_data(DataConfig(name="paints", num_classes=count), ("val",))
        image, labels = data.val[3]
        assert data.num_classes == len(data.labels.palette) == count
        assert (image.mode, labels.mode) == ("RGB", mode) and np.max(labels) < count
    with pytest.raises(UserError, match=r"data\.num_classes chooses the classes of paints; digits has its own"):
        resolve_labels(DataConfig(num_classes=12))
    for count in (1, 65536):
        with pytest.raises(UserError, match=r"data.num_classes: input should be .*, got"):
            load_config(None, ["data.name=paints", f"data.num_classes={count}"])


def test_every_class_occurs_once_in_as_many_regions_as_there_are_classes():
    # Nine scenes have 9, 10, ..., 17 regions.
    scenes = PaintScenes("train", 18, 64, 64, 3, num_classes=234)
    seen = [np.unique(labels) for _, labels in (scenes[index] for index in range(18))]
    assert [len(classes) for classes in seen] == [*range(9, 18)] * 2
    assert sorted(np.concatenate(seen)) == list(range(234))
    more = [np.unique(scenes[index][1]) for index in (18, 19)]
    assert more[0].tolist() != seen[0].tolist() and more[1].tolist() != seen[1].tolist()
    other = PaintScenes("val", 18, 64, 64, 3, num_classes=234)
    assert np.unique(other[0][1]).tolist() != seen[0].tolist()


def test_small_patches_tell_colors_and_textures_apart():
    """Nearest neighbours among other patches of 20 x 20 pixels, by their spectrum or by their colours: no network."""
    rng, side = np.random.default_rng(0), 20
    y, x = (axis.ravel().astype(np.float32) for axis in np.mgrid[:side, :side])
    window = np.outer(*[np.hanning(side + 2)[1:-1]] * 2)

    def patch(color, texture, second):
        label = color + len(COLORS) * (texture + len(TEXTURES) * second)
        return (textured(rng, label, 65535, y, x) + rng.normal(0, 0.06, (side * side, 3))).clip(0, 1)

    def spectrum(patch):
        # Along the direction of the largest variance. The texture covers the smaller part, so it is the positive end.
        centred = patch - patch.mean(0)
        along = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
        along = along * np.sign((along**3).mean())
        found = np.abs(np.fft.rfft2(along.reshape(side, side) * window)).ravel()
        return found / np.linalg.norm(found)

    def share_right(feature, numbers, known, asked):
        known, asked = np.tile(numbers, known), np.tile(numbers, asked)
        by_number = [np.array([feature(number) for number in some]) for some in (known, asked)]
        nearest = [np.square(by_number[0] - one).sum(-1).argmin() for one in by_number[1]]
        return np.mean(known[nearest] == asked)

    def textured_patch(texture):
        return spectrum(patch(rng.integers(len(COLORS)), texture, rng.integers(SECONDS)))

    assert share_right(textured_patch, np.arange(len(TEXTURES)), 40, 6) > 0.9

    # Each colour among the 288 by its mean, which a darker texture changes alike, and each second colour by its extremes.
    assert share_right(lambda color: patch(color, 0, 0).mean(0), np.arange(len(COLORS)), 12, 2) > 0.7
    extremes = lambda second: np.quantile(patch(150, 0, second), (0.02, 0.98), axis=0).ravel()  # noqa: E731
    assert share_right(extremes, np.arange(SECONDS), 20, 10) > 0.9


def test_the_splits_share_no_digits():
    train, val = ({digit.tobytes() for digit in _digits(split)[0]} for split in ("train", "val"))
    assert not train & val and len(val) > 300


def test_folder_pairs(folder_data):
    data = open_data(DataConfig(**folder_section(folder_data)))
    assert (len(data.train), len(data.val), data.num_classes) == (4, 2, 3)
    image, labels = data.train[0]
    assert image.size == labels.size == (40, 24)
    assert set(np.unique(labels)) <= {0, 1, 2, 255} and 255 in np.unique(labels)


def test_read_image_reduces_16_bit_grey_and_turns_only_on_request(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    read = np.asarray(read_image(tmp_path / "deep.png"))[..., 0]
    assert np.abs(read.astype(int) - ramp // 257).max() <= 1
    photo = Image.new("RGB", (40, 20))
    photo.putpixel((0, 0), (255, 255, 255))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (40, 20)
    assert read_image(tmp_path / "turned.png", upright=True).size == (20, 40)


def test_ignored_values_become_255(folder_data):
    path = folder_data / "labels" / "train" / "a.png"
    Image.fromarray(np.full((24, 40), 11, np.uint8)).save(path)
    data = open_data(DataConfig(**folder_section(folder_data, ignore=[11])))
    assert (np.array(data.train[0][1]) == 255).all()


def test_the_table_of_data_sets_has_every_name_of_the_settings():
    assert tuple(DATA_SETS) == DATA_NAMES


def _missing_label(root):
    (root / "labels" / "train" / "b.png").unlink()


def _jpeg_label(root):
    path = root / "labels" / "train" / "b.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()


def _other_size(root):
    Image.new("L", (40, 23)).save(root / "labels" / "train" / "b.png")


def _unknown_value(root):
    Image.fromarray(np.full((24, 40), 7, np.uint8)).save(root / "labels" / "train" / "b.png")


def _colour_labels(root):
    Image.new("RGB", (40, 24)).save(root / "labels" / "train" / "b.png")


def _broken_image(root):
    (root / "images" / "train" / "b.jpg").write_bytes(b"not a picture")


def _truncated_label(root):
    path = root / "labels" / "train" / "b.png"
    path.write_bytes(path.read_bytes()[:40])


def _empty(root):
    for path in (root / "images" / "train").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_missing_label, ["b.jpg", "no label map", "b.png"]),
        (_jpeg_label, ["b.jpg", "no label map", "b.png", "JPEG changes label values; save label maps as PNG"]),
        (_other_size, ["b.png", "40x23", "40x24"]),
        (_unknown_value, ["b.png", "values 7", "0..2", "data.ignore"]),
        (_colour_labels, ["b.png", "one channel", "3"]),
        (_broken_image, ["b.jpg", "cannot be read as an image"]),
        (_truncated_label, ["b.png", "cannot be read as a label map"]),
        (_empty, ["no images"]),
    ],
)
def test_opening_the_data_names_a_damaged_file(folder_data, damage, words):
    damage(folder_data)
    with pytest.raises(UserError) as error:
        open_data(DataConfig(**folder_section(folder_data)))
    for word in words:
        assert word in str(error.value)


def test_wrong_folders_and_class_lists_are_errors(folder_data, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_data(DataConfig(**folder_section(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"split 'test'.*found train, val"):
        open_data(DataConfig(**folder_section(folder_data, val_split="test")))
    with pytest.raises(UserError, match="--root"):
        open_data(DataConfig(name="camvid"))
    for section, words in (
        ({"name": "folder"}, "data.classes is missing"),
        ({"name": "folder", "classes": ["a", "a"]}, "listed twice"),
        ({"name": "folder", "classes": ["a", "b"], "ignore": [1]}, "is the class 'b'"),
        ({"name": "folder", "classes": ["a", "b"], "palette": [(1, 2, 3)]}, "one colour for each of 2"),
        ({"name": "digits", "root": "x"}, "do not apply to digits"),
        ({"name": "paints", "ignore": [3]}, "do not apply to paints"),
    ):
        with pytest.raises(UserError, match=words):
            resolve_labels(DataConfig(**section))


def _copies(root, name, *suffixes, kind="images"):
    folder = root / kind / "train"
    first = next(folder.glob(f"{name}.*"))
    for suffix in suffixes:
        Image.open(first).save(folder / f"{name}{suffix}")
    return first


def test_hidden_files_and_index_files_of_systems_are_skipped(folder_data):
    for kind in ("images", "labels"):
        folder = folder_data / kind / "train"
        (folder / "._a.png").write_bytes(b"\0\5\26\7")
        for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
            (folder / name).write_text("x")
        (folder / ".ipynb_checkpoints").mkdir()
        Image.new("L", (40, 24)).save(folder / ".ipynb_checkpoints" / "a.png")
        (folder / "empty.png").mkdir()
    data = open_data(DataConfig(**folder_section(folder_data)))
    assert data.train.names == ["a", "b", "c", "d"]


def test_images_and_label_maps_of_every_suffix_are_found(folder_data):
    for name, suffix in zip("abcd", (".tif", ".webp", ".BMP", ".TIFF")):
        _copies(folder_data, name, suffix).unlink()
    for name, suffix in zip("ab", (".tif", ".bmp")):
        _copies(folder_data, name, suffix, kind="labels").unlink()
    data = open_data(DataConfig(**folder_section(folder_data)))
    assert [path.suffix for path in data.train.images] == [".tif", ".webp", ".BMP", ".TIFF"]
    assert [path.suffix for path in data.train.labels] == [".tif", ".bmp", ".png", ".png"]
    assert all(len(data.train[index]) == 2 for index in range(4))


def test_sub_folders_are_read_if_the_labels_have_them_too(folder_data):
    for kind in ("images", "labels"):
        folder = folder_data / kind / "train"
        (folder / "ulm").mkdir()
        for path in folder.glob("[ab].*"):
            path.rename(folder / "ulm" / path.name)
    # Files of the same name in two folders are two examples.
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        path = folder_data / kind / "train" / f"a.{suffix}"
        path.write_bytes((path.parent / "ulm" / path.name).read_bytes())
    assert open_data(DataConfig(**folder_section(folder_data))).train.names == ["a", "c", "d", "a", "b"]
    thumbnails = folder_data / "images" / "train" / "small"
    thumbnails.mkdir()
    Image.new("RGB", (4, 2)).save(thumbnails / "a.jpg")
    with pytest.warns(
        DataWarning, match=r"1 images in sub-folders that .*labels/train does not have are left out.*small"
    ):
        assert len(open_data(DataConfig(**folder_section(folder_data))).train) == 5


def _other_kinds(root):
    for name in ("x.heic", "y.heic", "z.txt"):
        (root / "images" / "train" / name).write_bytes(b"x")


def _lonely_label(root):
    (root / "images" / "train" / "b.jpg").unlink()


@pytest.mark.parametrize(
    ("change", "words", "count"),
    [
        (_other_kinds, r"3 files are left out.*2 \.heic \(such as x\.heic\), 1 \.txt", 4),
        (_lonely_label, r"label maps without an image in .*images/train: 1, such as b\.png", 3),
    ],
)
def test_a_warning_names_files_that_are_left_out(folder_data, change, words, count):
    change(folder_data)
    with pytest.warns(DataWarning, match=words):
        assert len(open_data(DataConfig(**folder_section(folder_data))).train) == count


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_two_files_with_the_same_name_are_an_error(folder_data, kind):
    _copies(folder_data, "b", ".tif", kind=kind)
    words = rf"{kind}/train/b\.(jpg|png) and .*b\.tif: two .* with the same name"
    with pytest.raises(UserError, match=words):
        open_data(DataConfig(**folder_section(folder_data)))


@pytest.mark.parametrize("name", ["[x] {y} %s #1", "漢字 ü", "a.b.c"])
def test_the_name_of_a_pair_may_be_any_text(folder_data, name):
    for kind, suffix, form in (("images", "jpg", "NFD"), ("labels", "png", "NFC")):
        path = folder_data / kind / "train" / f"a.{suffix}"
        path.rename(path.with_name(unicodedata.normalize(form, f"{name}.{suffix}")))
    data = open_data(DataConfig(**folder_section(folder_data)))
    found = [unicodedata.normalize("NFC", one) for one in data.train.names]
    assert sorted(found) == sorted([name, "b", "c", "d"]) and all(data.train[index] for index in range(4))


def test_settings_can_give_the_label_value_of_each_class(folder_data):
    for path in (folder_data / "labels").rglob("*.png"):
        values = np.asarray(Image.open(path))
        Image.fromarray(np.choose(values % 4, [0, 255, 7, 9]).astype(np.uint8)).save(path)
    data = open_data(DataConfig(**folder_section(folder_data, values=[0, 255, 7], ignore=[9])))
    labels = np.asarray(Image.open(folder_data / "labels/train/a.png"))
    assert np.array_equal(data.train[0][1], np.select([labels == 0, labels == 255, labels == 7], [0, 1, 2], 255))
    for values, words in (([0, 1], "one label value for each of 3 classes, got 2"), ([0, 1, 1], "1 is listed twice")):
        with pytest.raises(UserError, match=words):
            resolve_labels(DataConfig(**folder_section(folder_data, values=values)))
    with pytest.raises(UserError, match=r"data\.ignore: value 255 is the class 'b'"):
        resolve_labels(DataConfig(**folder_section(folder_data, values=[0, 255, 7], ignore=[255])))
    with pytest.raises(UserError, match="do not apply to digits"):
        resolve_labels(DataConfig(values=[1, 2]))


def test_camvid_preset():
    labels = resolve_labels(DataConfig(name="camvid"))
    assert len(labels.classes) == len(labels.palette) == 11 and labels.ignore == (11,)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 2.0), (0.4, 0.9)])
def test_augmentation_keeps_pixels_and_labels_together(scales):
    # Each label value has its own grey, so a pixel shows which label it must have.
    labels = np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20))).astype(np.uint8)
    image = Image.fromarray(np.repeat((labels * 20)[..., None], 3, -1))
    config = DataConfig(height=24, width=32, scale_min=scales[0], scale_max=scales[1], flip=True)
    for seed in range(8):
        pixels, target = augment(image, Image.fromarray(labels), config, np.random.default_rng(seed))
        assert pixels.shape == (3, 24, 32) and target.shape == (24, 32) and target.dtype == torch.uint8
        inside = target != 255
        grey = pixels[0].float()
        close = (grey - 20.0 * target).abs() < 3
        # Bilinear resampling mixes the greys at borders.
        assert close[inside].float().mean() > 0.55 and set(target[inside].tolist()) <= set(range(12))
        assert inside.all() == (scales[0] >= 1.0)


def test_inference_size_keeps_proportions_and_pads_to_patches():
    config = DataConfig(height=64, width=64)
    assert model_size((30, 60), config) == (32, 64) and model_size((37, 100), config) == (24, 64)
    assert model_size((30, 60), config, "cover") == (64, 128) and model_size((30, 60), config, "native") == (30, 60)
    assert model_size((30, 60), config, "fit", 1.5) == (48, 96)
    pixels = prepare(Image.new("RGB", (61, 64), (255, 0, 0)), (64, 61), 8)
    assert pixels.shape == (3, 64, 64) and (pixels[0] == 1).all() and (pixels[1] == -1).all()


def test_batches_are_a_function_of_the_seed_and_the_number_of_earlier_draws():
    config = tiny_config(data={"color_jitter": 0.3, "flip": True, "scale_max": 2.0})
    pairs = open_data(config.data).train

    def take(count, **options):
        batches = training_batches(pairs, config.data, 4, seed=7, **options)
        return [next(batches) for _ in range(count)]

    straight, resumed = take(5), take(2, first_draw=12)
    assert torch.cat([draws for _, _, draws in straight]).tolist() == list(range(20))
    for first, second in zip(straight[3:], resumed):
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    other = next(training_batches(pairs, config.data, 4, seed=8))
    assert not torch.equal(straight[0][0], other[0])
    # Two processes take turns: together they draw the same batches as a single process.
    first, second = take(2, rank=0, world=2), take(2, rank=1, world=2)
    for ours, theirs in zip((first[0], second[0], first[1], second[1]), straight):
        assert torch.equal(ours[0], theirs[0])


def test_the_error_of_a_worker_process_names_the_damaged_file(folder_data):
    config = DataConfig(**folder_section(folder_data), check="none", workers=1)
    (folder_data / "labels" / "train" / "b.png").write_bytes(b"no")
    with pytest.raises(UserError) as error:
        next(training_batches(open_data(config).train, config, 4, seed=0))
    assert (
        str(error.value).startswith(f"{folder_data}") and "\n" not in str(error.value) and "b.png" in str(error.value)
    )


def test_worker_processes_give_the_same_batches():
    config = tiny_config()
    pairs = open_data(config.data).train
    alone = next(training_batches(pairs, config.data, 4, seed=0))
    config.data.workers = 1
    helped = next(training_batches(pairs, config.data, 4, seed=0))
    assert torch.equal(alone[0], helped[0]) and torch.equal(alone[1], helped[1])
