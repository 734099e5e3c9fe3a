"""Prediction of files: which inputs are found, names of the results, and files that fail."""

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flowseg.errors import DataWarning, UserError
from flowseg.inference.predict import Input, find_images, find_inputs, output_names, predict
from flowseg.segment import Segmenter

from .support.networks import oracle_segmenter
from .support.photographs import SHOWN, exif, photo, stored, write_pair

PALETTE = [(10 * k, 0, 255 - 10 * k) for k in range(11)]


def segmenter(**data):
    return oracle_segmenter(data, sample={"resize": "native"})


def picture(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (16, 8), 90 if mode == "L" else (90, 0, 0)).save(path)
    return path


def written(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_results_of_sub_folders_go_to_sub_folders(tmp_path):
    for name in ("a.jpg", "one/a.tif", "one/deep er/b.webp", "two/a.BMP", ".hidden/c.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in/._a.jpg").write_bytes(b"\0\5\26\7")
    (tmp_path / "in/Thumbs.db").write_bytes(b"x")
    (tmp_path / "in/one/loop").symlink_to(tmp_path / "in")
    inputs = find_inputs([str(tmp_path / "in")])
    predict(segmenter(), inputs, tmp_path / "out", PALETTE, outputs=["mask"])
    assert written(tmp_path / "out") == ["a.mask.png", "one/a.mask.png", "one/deep er/b.mask.png", "two/a.mask.png"]


def test_a_warning_names_files_with_other_suffixes(tmp_path):
    picture(tmp_path / "in/a.jpg")
    for name in ("b.heic", "c.heic", "film.mp4", "notes"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.warns(
        DataWarning, match=r"4 files are left out.*2 \.heic \(such as b\.heic\).*1 \.mp4.*1 without a suffix"
    ):
        assert find_images([str(tmp_path / "in")]) == [tmp_path / "in/a.jpg"]
    (tmp_path / "in/a.jpg").unlink()
    with pytest.warns(DataWarning), pytest.raises(UserError, match=r"no images there.*only 2 \.heic"):
        find_images([str(tmp_path / "in")])
    for text in ("nothing/*.jpg", str(tmp_path / "no"), "a\0b", "x" * 5000):
        with pytest.raises(UserError, match="no such file"):
            find_images([text])


def test_earlier_results_are_not_inputs(tmp_path):
    picture(tmp_path / "a.png")
    once = None
    for inputs in ([str(tmp_path)], [str(tmp_path / "*.png")], [str(tmp_path / "a.png"), str(tmp_path / "a.mask.png")]):
        if once:
            with pytest.warns(DataWarning, match="names that predictions have, such as .*a.m"):
                found = find_inputs(inputs)
        else:
            found = find_inputs(inputs)
        predict(segmenter(), found, tmp_path, PALETTE, outputs=["mask", "overlay", "margin"])
        once = once or written(tmp_path)
        assert written(tmp_path) == once == ["a.margin.png", "a.mask.png", "a.overlay.png", "a.png"]
    with pytest.raises(UserError, match="only files with names that predictions have"):
        find_inputs([str(tmp_path / "a.mask.png")])


def test_names_of_results_are_distinct_by_folder_then_by_suffix(tmp_path):
    def names(*paths):
        return [str(name) for name in output_names([Input(tmp_path / path) for path in paths])]

    assert names("x/a.jpg", "y/b.jpg") == ["a", "b"]
    assert names("x/a.jpg", "y/a.jpg", "y/b.jpg") == ["x_a", "y_a", "b"]
    assert names("x/a.jpg", "x/a.png", "x/b.png") == ["a.jpg", "a.png", "b"]
    assert names("x/a.jpg", "x/a.png", "y/a.png") == ["x_a.jpg", "x_a.png", "y_a.png"]
    assert names("x/cam/a.jpg", "y/cam/a.jpg") == ["x_cam_a", "y_cam_a"]
    # x_a is already the name of another file.
    assert names("x/a.jpg", "y/a.jpg", "x_a.jpg") == ["x_a.jpg", "y_a.jpg", "x_a"]
    for case in (["x/a.jpg", "y/a.jpg", "x_a.jpg"], ["1/2/3/4/a.jpg", "9/2/3/4/a.jpg", "8/2/3/4/a.jpg"]):
        assert len(set(names(*case))) == len(case)
    many = [Input(tmp_path / f"{k % 50}/{k // 2}.jpg") for k in range(20_000)]
    begin = time.process_time()
    assert len(set(output_names(many))) == len(many)
    # An algorithm with quadratic time would take minutes.
    assert time.process_time() - begin < 10


def test_files_that_differ_only_in_their_suffix_are_both_segmented(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        picture(tmp_path / "in" / name)
    result = predict(segmenter(), find_inputs([str(tmp_path / "in")]), tmp_path / "out", PALETTE, outputs=["mask"])
    assert written(tmp_path / "out") == ["a.jpg.mask.png", "a.png.mask.png", "b.mask.png"] and not result.failed


@pytest.mark.parametrize("name", ["[red]x[bold", "a{0}%s", "über 漢字", "x" * 240, "*?", "a\nb"])
def test_the_name_of_a_file_may_be_any_text(tmp_path, name):
    file = picture(tmp_path / "[in]" / f"{name}.png")
    for inputs in ([str(file)], [str(file.parent)]):
        result = predict(segmenter(), find_inputs(inputs), tmp_path / "{out}", PALETTE, outputs=["mask"])
        assert [path.name for path in result.written] == [f"{name}.mask.png"] and not result.failed


def test_files_that_fail_are_reported_and_the_others_segmented(tmp_path, monkeypatch):
    files = [picture(tmp_path / f"{name}.png") for name in ("bad", "large", "long" + "x" * 247, "sound")]
    files[0].write_bytes(files[0].read_bytes()[:50])
    one = segmenter()
    labels = one.labels
    sizes = iter([16, 9, 9])

    def short_of_memory(image, **options):
        if next(sizes) == 16:
            raise MemoryError
        return labels(image, **options)

    monkeypatch.setattr(one, "labels", short_of_memory)
    result = predict(one, files, tmp_path / "out", PALETTE, outputs=["mask"])
    assert written(tmp_path / "out") == ["sound.mask.png"]
    assert [path for path, _ in result.failed] == files[:3]
    assert "cannot be read as an image" in result.failed[0][1] and "sample.window=slide" in result.failed[1][1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("setting", ["upright", "stored"])
def test_masks_are_turned_like_label_maps(tmp_path, orientation, setting):
    """The oracle reads the class from the red channel: 12 * 220 / 255 is class 10, 12 * 30 / 255 is class 1."""
    write_pair(tmp_path, orientation, labels=setting, suffix="png")
    file = tmp_path / "images/val/a.png"
    one = segmenter(exif=setting)
    predict(one, [file], tmp_path, PALETTE, outputs=["mask", "overlay", "margin"], opacity=0.0)
    mask = np.asarray(Image.open(tmp_path / "a.mask.png"))
    assert np.array_equal(mask == 10, np.asarray(Image.open(tmp_path / "labels/val/a.png")) == 1)
    shown = photo(SHOWN) if setting == "upright" else stored(photo(SHOWN), orientation)
    assert np.array_equal(Image.open(tmp_path / "a.overlay.png"), shown)
    assert Image.open(tmp_path / "a.margin.png").size == mask.shape[::-1]
    assert exif(orientation)[0x0112] == Image.open(file).getexif()[0x0112]


def as_mode(mode):
    shown = photo(SHOWN)
    return (
        shown.quantize(4)
        if mode == "P"
        else shown.convert("L").convert(mode)
        if mode in ("1", "LA")
        else shown.convert(mode)
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_labels_accepts_images_of_any_mode(mode):
    grey = np.asarray(photo(SHOWN).convert("L")).astype(np.float64) / 255
    deep = {
        "I;16": (grey * 65535).astype(np.uint16),
        "I": (grey * 65535).astype(np.int32),
        "F": grey.astype(np.float32),
    }
    picture = Image.fromarray(deep[mode]) if mode in deep else as_mode(mode)
    wanted = photo(SHOWN).convert("L").convert("RGB") if mode in deep else picture.convert("RGB")
    one = segmenter()
    assert picture.mode == mode
    assert torch.equal(one.labels(picture), one.labels(wanted))


def test_labels_accepts_arrays_and_paths(tmp_path):
    one, pixels = segmenter(), np.asarray(photo(SHOWN))
    wanted = one.labels(photo(SHOWN))
    assert wanted.shape == (48, 64) and set(wanted.unique().tolist()) == {1, 10}
    opaque = np.concatenate([pixels, np.full((48, 64, 1), 9, np.uint8)], -1)
    for image in (pixels, opaque, pixels[::-1][::-1], np.asfortranarray(pixels)):
        assert torch.equal(one.labels(image), wanted)
    grey = pixels[..., 0]
    for image in (
        grey[..., None],
        grey.astype(np.uint16) * 257,
        grey.astype(np.uint32) * 257,
        grey / 255,
        grey / np.float16(255),
    ):
        assert (one.labels(image) != one.labels(grey)).float().mean() < 0.01
    photo(SHOWN).save(tmp_path / "a.png")
    assert torch.equal(one.labels(tmp_path / "a.png"), wanted) and torch.equal(
        one.labels(str(tmp_path / "a.png")), wanted
    )
    margin = one.labels(pixels, with_margin=True)[1]
    assert margin.dtype == torch.float32 and margin.shape == wanted.shape


@pytest.mark.parametrize("setting", ["upright", "stored"])
def test_labels_of_a_path_are_turned_like_masks(tmp_path, setting):
    write_pair(tmp_path, 6, labels=setting, suffix="png")
    found = segmenter(exif=setting).labels(tmp_path / "images/val/a.png")
    assert np.array_equal(found == 10, np.asarray(Image.open(tmp_path / "labels/val/a.png")) == 1)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 8, 8), r"got Tensor of shape \(3, 8, 8\) and dtype torch\.float32"),
        (np.zeros((3, 8, 8), np.uint8), r"got array of shape \(3, 8, 8\) and dtype uint8"),
        (np.zeros((8, 8, 3)), r"got array of shape \(8, 8, 3\) and dtype float64"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.zeros((8, 8), bool), "dtype bool"),
        (None, "got NoneType"),
        ([1, 2], "got list"),
    ],
)
def test_labels_refuses_other_inputs(image, words):
    with pytest.raises(
        UserError, match=rf"image: wanted a path, a Pillow image, or a numpy array \(H, W, 3\).*{words}"
    ):
        segmenter().labels(image)


def test_labels_refuses_a_missing_file_and_values_of_unknown_scale(tmp_path):
    with pytest.raises(UserError, match=r"no\.png: cannot be read as an image"):
        segmenter().labels(tmp_path / "no.png")
    with pytest.raises(UserError, match=r"image: image has float values from 0 to 255.*data\.white"):
        segmenter().labels(np.linspace(0, 255, 64).reshape(8, 8))


def test_an_image_that_needs_too_much_memory_is_reported_and_the_others_segmented(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{name}.png") for name in "abc"]
    real = Segmenter.labels

    def labels(self, image, **options):
        if image.getpixel((0, 0))[1]:
            torch.empty(2**45)
        return real(self, image, **options)

    Image.new("RGB", (16, 8), (0, 9, 0)).save(paths[1])
    monkeypatch.setattr(Segmenter, "labels", labels)
    result = predict(segmenter(), paths, tmp_path / "out", PALETTE, outputs=("mask",))
    assert [path.name for path, _ in result.failed] == ["b.png"] and "does not fit into memory" in result.failed[0][1]
    assert written(tmp_path / "out") == ["a.mask.png", "c.mask.png"]


def test_a_pipe_is_not_an_image(tmp_path):
    picture(tmp_path / "in/a.png")
    os.mkfifo(tmp_path / "in/b.png")
    assert find_images([str(tmp_path / "in")]) == [tmp_path / "in/a.png"]
    result = predict(segmenter(), [tmp_path / "in/b.png"], tmp_path / "out", PALETTE)
    assert "not a regular file" in result.failed[0][1]


def test_a_file_named_by_several_paths_is_segmented_once(tmp_path, monkeypatch):
    path = picture(tmp_path / "in/a.png")
    monkeypatch.chdir(tmp_path)
    assert len(find_inputs(["in/a.png", "./in/a.png", str(path), "in", str(tmp_path / "in")])) == 1


def test_names_of_results_differ_without_regard_to_case(tmp_path):
    names = output_names([Input(tmp_path / "a/x.png"), Input(tmp_path / "b/X.png"), Input(tmp_path / "a/y.png")])
    assert len({str(name).casefold() for name in names}) == 3


def test_a_warning_names_a_file_of_several_pages(tmp_path):
    pages = [Image.new("RGB", (16, 8), (k, 0, 0)) for k in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(DataWarning, match=r"a\.tif: has 3 pages or frames; only the first is used"):
        assert not predict(segmenter(), [tmp_path / "a.tif"], tmp_path / "out", PALETTE).failed
