"""Image files: EXIF orientation, damaged files, the limit of pixels, and the depth of images and label maps."""

import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from flowseg.config import DataConfig
from flowseg.data import open_data
from flowseg.data.folder import read_image
from flowseg.data.pictures import Reading, read_picture, read_values, turn_back, turn_values
from flowseg.errors import DataWarning, UserError

from .support.photographs import SHOWN, photo, write_pair


def pair(root, **section):
    image, labels = open_data(DataConfig(name="folder", root=root, classes=["sky", "object"], **section)).train[0]
    return np.asarray(image)[..., 0] > 128, np.asarray(labels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.filterwarnings("ignore::flowseg.errors.DataWarning")
def test_images_are_turned_as_a_viewer_shows_them_and_labels_lie_on_them(tmp_path, orientation, suffix):
    for labels in ("upright", "stored"):
        red, found = pair(write_pair(tmp_path, orientation, suffix=suffix, labels=labels), exif=labels)
        assert np.array_equal(red, SHOWN == 1) and np.array_equal(found, SHOWN)
    file = tmp_path / f"images/train/a.{suffix}"
    assert read_image(file, upright=True).size == (64, 48)
    assert read_image(file).size == ((48, 64) if orientation >= 5 else (64, 48))
    picture, shape = read_picture(file, Reading())
    assert np.array_equal(turn_back(picture, shape.orientation), read_image(file))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_arrays_are_turned_as_pictures_are(orientation):
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    saved = picture.copy()
    saved.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(saved))
    assert np.array_equal(turn_values(np.asarray(picture), orientation), wanted)
    assert np.array_equal(turn_back(Image.fromarray(wanted), orientation), picture)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("drawn", ["upright", "stored"])
@pytest.mark.parametrize("check", ["full", "headers", "none"])
def test_labels_whose_size_fits_the_other_view_only_are_refused(tmp_path, orientation, drawn, check):
    other = {"upright": "stored", "stored": "upright"}[drawn]
    write_pair(tmp_path, orientation, labels=drawn)
    with pytest.raises(UserError, match=rf"a\.png: .*EXIF orientation {orientation}.*--set data\.exif={drawn}"):
        pair(tmp_path, exif=other, check=check)
    red, found = pair(tmp_path, exif=drawn, check=check)
    assert np.array_equal(red, found)


def test_labels_whose_size_fits_both_views_follow_the_setting_and_are_named(tmp_path):
    write_pair(tmp_path, 3, labels="stored")
    with pytest.warns(
        DataWarning, match=r"1 of 1 images, such as .*a\.jpg, have an EXIF orientation .*data\.exif=stored"
    ):
        red, found = pair(tmp_path)
    assert not np.array_equal(red, found)
    red, found = pair(tmp_path, exif="stored")
    assert np.array_equal(red, found)


@pytest.mark.parametrize("setting", ["upright", "stored"])
def test_labels_with_an_orientation_of_their_own_are_turned_by_it(tmp_path, setting):
    red, found = pair(write_pair(tmp_path, 6, own=8), exif=setting)
    assert np.array_equal(red, SHOWN == 1) and np.array_equal(found, SHOWN)
    # The image has none: a tool that turned the photograph and forgot the labels.
    red, found = pair(write_pair(tmp_path, 1, own=6), exif=setting)
    assert np.array_equal(red, SHOWN == 1) and np.array_equal(found, SHOWN)


def test_sizes_that_fit_no_view_are_named_with_the_orientation(tmp_path):
    write_pair(tmp_path, 6)
    Image.new("L", (64, 47)).save(tmp_path / "labels/train/a.png")
    with pytest.raises(
        UserError, match=r"a\.png: label map is 64x47 but its image is 64x48 \(turned by EXIF orientation 6\)"
    ):
        pair(tmp_path)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits, color, rows, size, *, before=b""):
    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0)
    data = b"".join(b"\0" + row for row in rows)
    end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + end


ODD_TAGS = {
    "another type": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02a\0\0\0\0\0\0\0",
    "no number": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\x00\x4d\0\0\0\0\0\0",
    "cut short": b"MM\0*\0\0\0\x08\0\x09\x01",
    "far away": b"MM\0*\xff\xff\xff\xf0",
    "rubbish": b"rubbish",
    "nothing": b"",
}


@pytest.mark.parametrize("name", ODD_TAGS)
@pytest.mark.parametrize("kind", ["image", "label"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_tags_are_passed_over_or_named(tmp_path, name, kind):
    file = tmp_path / "odd.png"
    file.write_bytes(png(8, 0, [bytes(range(4))] * 3, (4, 3), before=chunk(b"eXIf", ODD_TAGS[name])))
    try:
        found = (
            read_values(file, Reading())[0] if kind == "label" else np.asarray(read_picture(file, Reading())[0])[..., 0]
        )
        assert found.tolist() == [[0, 1, 2, 3]] * 3
    except UserError as error:
        assert "odd.png: cannot be read as" in str(error)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp", "gif", "ppm"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_a_decoder_raises_names_the_file(tmp_path, suffix):
    file, draw = tmp_path / f"a.{suffix}", random.Random(suffix)
    photo(SHOWN).save(file)
    whole, failed = file.read_bytes(), 0
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            spoilt[draw.randrange(min(len(spoilt), 300))] = draw.randrange(256)
        file.write_bytes(spoilt[: draw.choice([len(spoilt), draw.randrange(len(spoilt))])])
        for read in (read_picture, read_values):
            try:
                read(file, Reading(max_megapixels=1))
            except UserError as error:
                assert str(error).startswith(str(file))
                failed += 1
    assert failed > 20


def image_of(tmp_path, values, suffix="tif", **reading):
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    return np.asarray(read_picture(tmp_path / f"deep.{suffix}", Reading(**reading))[0])[..., 0].astype(int)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "white"),
    [
        ((RAMP * 65535).astype(np.uint16), None),
        ((RAMP * 65535).astype(np.int32), None),
        (RAMP.astype(np.float32), None),
        ((RAMP * 4095).astype(np.uint16), 4095),
        ((RAMP * 1023).astype(np.int32), 1023),
        ((RAMP * 1e6).astype(np.int32), 1e6),
        ((RAMP * 255).astype(np.float32), 255),
    ],
)
def test_deep_images_keep_their_shades(tmp_path, values, white):
    assert np.abs(image_of(tmp_path, values, white=white) - np.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((RAMP * 4095).astype(np.uint16), "integer values from 0 to 4095"),
        ((RAMP * 16383).astype(np.uint16), "integer values from 0 to 16383"),
        ((RAMP * 1e6).astype(np.int32), r"integer values from 0 to 1e\+06"),
        ((RAMP * 60000 - 5000).astype(np.int32), "integer values from -5000"),
        ((RAMP * 255).astype(np.float32), "float values from 0 to 255"),
        ((RAMP / 10).astype(np.float32), r"float values from 0 to 0\.1"),
        ((RAMP - 0.5).astype(np.float32), r"float values from -0\.5"),
    ],
)
def test_deep_images_of_another_range_are_refused_with_the_setting(tmp_path, values, words):
    with pytest.raises(UserError, match=rf"deep\.tif: image has {words}.*data\.white"):
        image_of(tmp_path, values)


def test_floats_that_are_no_numbers_are_refused_and_black_is_black(tmp_path):
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match=r"deep\.tif: .*not finite"):
            image_of(tmp_path, np.where(RAMP > 0.5, bad, RAMP).astype(np.float32), white=1.0)
    for kind in (np.uint16, np.int32, np.float32):
        assert image_of(tmp_path, np.zeros((4, 4), kind)).max() == 0
    # Beyond the value that was named lies white, below 0 black.
    found = image_of(tmp_path, np.array([[-9, 0, 100, 999]], np.int32), white=100)
    assert found.tolist() == [[0, 0, 255, 255]]


def test_16_bit_colours_that_are_nearly_black_are_refused(tmp_path):
    file = tmp_path / "deep.png"
    for top in (65535, 4095):
        colors = np.linspace(0, top, 12).astype(">u2").reshape(4, 3)
        opaque = np.concatenate([colors, np.full((4, 1), 65535)], 1).astype(">u2")
        for kind, row in ((2, colors), (6, opaque)):
            file.write_bytes(png(16, kind, [row.tobytes()], (4, 1)))
            if top == 4095:
                with pytest.raises(UserError, match=r"deep\.png: image has 16-bit colours .*data\.white=65535"):
                    read_picture(file, Reading())
            else:
                read_picture(file, Reading())
            assert np.array_equal(np.asarray(read_picture(file, Reading(white=65535))[0])[0], colors >> 8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("color", [0, 3])
def test_label_values_of_few_bits_are_the_stored_numbers(tmp_path, bits, color):
    values = (np.arange(16) % 2**bits).astype(np.uint8).reshape(2, 8)
    per_byte = 8 // bits
    rows = []
    for row in values:
        groups = row.reshape(-1, per_byte)
        rows.append(bytes(sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(group)) for group in groups))
    colors = chunk(b"PLTE", bytes(range(3 * min(2**bits, 80)))) if color == 3 else b""
    (tmp_path / "few.png").write_bytes(png(bits, color, rows, (8, 2), before=colors))
    found = read_values(tmp_path / "few.png", Reading())[0]
    assert found.dtype == np.uint8 and np.array_equal(found, values)


@pytest.mark.parametrize("suffix", ["tif", "bmp", "png"])
def test_label_maps_of_lossless_files(tmp_path, suffix):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_values(tmp_path / f"a.{suffix}", Reading())[0], values)
    Image.fromarray(values > 5).save(tmp_path / f"b.{suffix}")
    assert np.array_equal(read_values(tmp_path / f"b.{suffix}", Reading())[0], values > 5)


def test_label_maps_that_cannot_hold_classes_are_refused(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "lossy.png", format="JPEG")
    with pytest.raises(UserError, match=r"lossy\.png: label map is a JPEG.*save it as PNG"):
        read_values(tmp_path / "lossy.png", Reading())
    for bad in (values.astype(np.float32), values.astype(np.int32) - 1, values.astype(np.int32) * 10**6):
        Image.fromarray(bad).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match=r"a\.tif: label values must be whole numbers in 0\.\.65535"):
            read_values(tmp_path / "a.tif", Reading())
    Image.fromarray(values.astype(np.int32) * 5000).save(tmp_path / "a.tif")
    assert np.array_equal(read_values(tmp_path / "a.tif", Reading())[0], values.astype(np.uint16) * 5000)
