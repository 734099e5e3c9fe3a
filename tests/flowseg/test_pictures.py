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

# What a viewer shows: an object at the upper left. Its 48x64 form is 64 wide.
SHOWN = np.zeros((48, 64), np.uint8)
SHOWN[:16, :24] = 1
STORE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(picture, orientation):
    """The pixels of a file that a viewer shows as ``picture``."""
    return picture.transpose(STORE[orientation]) if orientation in STORE else picture


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def photo(shown):
    return Image.fromarray(np.where(shown[..., None] == 1, [220, 30, 30], [30, 30, 220]).astype(np.uint8))


def write_pair(root, orientation, *, shown=SHOWN, suffix="jpg", labels="upright", own=1):
    """A photograph that a viewer shows as ``shown``, with labels drawn on that or on the stored pixels, in both splits."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        options = {"quality": 95} if suffix == "jpg" else {}
        stored(photo(shown), orientation).save(root / f"images/{split}/a.{suffix}", exif=exif(orientation), **options)
        label = Image.fromarray(shown)
        label = stored(label, orientation if labels == "stored" else own)
        label.save(root / f"labels/{split}/a.png", **({"exif": exif(own)} if own != 1 else {}))
    return root


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
