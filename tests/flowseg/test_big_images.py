"""Photographs and aerial images: memory that is bounded by the pixels of one image, and the limit of pixels."""

import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from flowseg.config import DataConfig
from flowseg.data import open_data
from flowseg.data.pictures import Reading, read_picture, read_values
from flowseg.errors import UserError

from .tiny import folder_section

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A process of its own: the peak of a process never comes down.
PEAK = """
import numpy as np
from PIL import Image
import torch
torch.set_num_threads(1)
from flowseg.codes import build_codebook
from flowseg.inference.evaluate import evaluate
from flowseg.segment import Segmenter
from tests.flowseg.support.networks import Waves
from tests.flowseg.tiny import tiny_config

class Photos:
    names = ()
    def __init__(self, count, size):
        self.count, self.size = count, size
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return Image.new("RGB", self.size, (index, 99, 200)), Image.fromarray(np.full(self.size[::-1], index, np.uint8))

def segmenter(classes, **sections):
    config = tiny_config(**sections)
    codebook = build_codebook(config.codes, classes)
    return Segmenter(Waves(), codebook, config)

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def validate(size, **sample):
    evaluate(segmenter(11, codes={"channels": 16}, sample={"batch_size": 4, **sample}), Photos(4, size))

def slide(size, **sample):
    windows = {"window": "slide", "resize": "native", "flip": True, "stride": 1.0}
    segmenter(80, data={"height": 128, "width": 128}, sample=windows).labels(Photos(1, size)[0][0])

jobs = (validate, {}), (validate, {"upsample": "codes"}), (slide, {})
for job, options in jobs:
    job((64, 48), **options)
before = peak()
for job, options in jobs:
    job((1600, 1000), **options)
    print(peak() - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_the_peak_does_not_hold_a_map_of_numbers_for_each_pixel():
    # Large arrays get pages of their own, which go back to the system when they are freed: the peak varies by 1 MB, not by 50.
    steady = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **steady}
    )
    assert done.returncode == 0, done.stderr
    # Megabytes that are not to be held: C native maps of each image of a batch, and K native maps of one image.
    validate, codes, slide = map(float, done.stdout.split())
    assert validate < 0.25 * 4 * 16 * 6.4 and codes < 0.45 * 4 * 16 * 6.4 and slide < 0.4 * 80 * 6.4


def test_the_limit_of_pixels_is_a_setting_and_no_global(folder_data, tmp_path, monkeypatch):
    Image.new("RGB", (1500, 1000)).save(tmp_path / "large.png")
    Image.new("L", (1500, 1000)).save(tmp_path / "labels.png")
    words = r"large\.png: 1500x1000 is 1\.5 megapixels, more than data\.max_megapixels \(1\); .*data\.max_megapixels=2"
    with pytest.raises(UserError, match=words):
        read_picture(tmp_path / "large.png", Reading(max_megapixels=1))
    with pytest.raises(UserError, match=r"labels\.png: 1500x1000"):
        read_values(tmp_path / "labels.png", Reading(max_megapixels=1))
    with pytest.raises(UserError, match=r"data\.max_megapixels"):
        open_data(DataConfig(**folder_section(folder_data), max_megapixels=0.0005))
    # Pillow warns above its own limit and raises at twice that, in some decoders once more.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for suffix in ("png", "jpg", "tif", "webp"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            Image.new("RGB", (150, 100), (9, 9, 9)).save(tmp_path / f"a.{suffix}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_picture(tmp_path / f"a.{suffix}", Reading())[0].size == (150, 100)
        assert Image.MAX_IMAGE_PIXELS == 1000
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a\.png"):
        read_picture(tmp_path / "a.png", Reading())
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_large_label_map_is_read_band_by_band(tmp_path):
    values = np.random.default_rng(0).integers(0, 3, (1100, 1200)).astype(np.uint8)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (1200, 1100)).save(tmp_path / f"images/{split}/a.png")
        Image.fromarray(values).save(tmp_path / f"labels/{split}/a.png")
    pairs = open_data(DataConfig(name="folder", root=tmp_path, classes=["a", "b"], ignore=[2])).train
    assert np.array_equal(pairs[0][1], np.where(values == 2, 255, values))
    assert pairs.counts[:3].tolist() == np.bincount(values.ravel()).tolist() and pairs.counts[3:].sum() == 0
