"""More than 255 classes: label maps of 16 bits, class names from a file, counts without K x K numbers, and a whole run."""

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flowseg.codes import build_codebook
from flowseg.config import CodesConfig, DataConfig, load_config
from flowseg.data import open_data, resolve_labels, training_batches
from flowseg.data.loader import example_batches
from flowseg.data.presets import spread_palette
from flowseg.data.transforms import augment
from flowseg.errors import UserError
from flowseg.inference import evaluate as evaluation
from flowseg.inference.counts import ClassCounts, ConfusedPairs, PairCounts, confused_pairs
from flowseg.inference.evaluate import evaluate, scores_by_class, scores_from_confusion
from flowseg.inference.predict import colorize
from flowseg.inference.views import enlarge_labels, likeliest
from flowseg.label_kinds import BYTES, MOST_CLASSES, WORDS, label_kind
from flowseg.report.page import search_table
from flowseg.runs.metrics import read_metrics
from flowseg.segment import Segmenter
from flowseg.training.trainer import train
from flowseg_kernels import nearest_centroid

from .support.commands import run
from .support.many_classes import many_classes_section, write_many_classes
from .support.networks import Pairs, Waves
from .tiny import tiny_config

CODES = {"channels": 8, "sequence": "r_sequence"}


@pytest.fixture
def lvis(tmp_path):
    """A folder of 1,203 classes, as many as LVIS has."""
    return write_many_classes(tmp_path / "data", 1203)


def values_of(path):
    return np.asarray(Image.open(path)).astype(np.int64)


def numpy_scores(truths, predictions, classes):
    """mIoU and accuracy in percent by their definitions, from sets of pixels; labels outside of the classes are ignored."""
    truth, found = (np.concatenate([part.ravel() for part in parts]) for parts in (truths, predictions))
    found, truth = found[truth < classes], truth[truth < classes]
    present = np.union1d(truth, found[found < classes])
    ious = [((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum() for k in present]
    return 100 * np.mean(ious), 100 * (truth == found).mean()


# ---- Label maps ----


def test_one_place_decides_dtype_and_ignored_value():
    assert label_kind(2) is label_kind(255) is BYTES and BYTES[:2] == (255, torch.uint8)
    assert label_kind(256) is label_kind(MOST_CLASSES) is WORDS and WORDS[:2] == (65535, torch.int32)
    for classes, ignored in ((255, 255), (256, 65535), (1203, 65535)):
        assert build_codebook(CodesConfig(**CODES), classes).ignore_index == ignored


def test_label_maps_of_16_bits_are_read(lvis):
    data = open_data(DataConfig(**many_classes_section(lvis, 1203)))
    assert data.num_classes == 1203 and data.labels.classes[1202] == "thing 1202"
    for pairs, split in ((data.train, "train"), (data.val, "val")):
        for (_, target), path in zip(pairs, sorted((lvis / "labels" / split).iterdir())):
            values = values_of(path)
            assert values.max() == 1203 and (values == 0).any()
            assert target.mode == "I" and np.array_equal(target, np.where(values == 0, 65535, values - 1))
    assert {path.suffix for path in (lvis / "labels" / "train").iterdir()} == {".png", ".tif"}


@pytest.mark.parametrize("form", ["png", "tif", "deflated tif", "big-endian tif", "32-bit tif", "8-bit png"])
def test_every_form_of_label_file_means_the_same_classes(lvis, form):
    path = lvis / "labels/val/e.png"
    values = values_of(path)
    path.unlink()
    if form == "8-bit png":
        # A map of a run with many classes may contain only small values.
        values = values % 250
        Image.fromarray(values.astype(np.uint8)).save(path)
    elif form == "big-endian tif":
        Image.fromarray(values.astype(">u2")).save(path.with_suffix(".tif"))
    elif form == "32-bit tif":
        Image.fromarray(values.astype(np.int32)).save(path.with_suffix(".tif"))
    else:
        options = {"compression": "tiff_deflate"} if form == "deflated tif" else {}
        Image.fromarray(values.astype(np.uint16)).save(path.with_suffix("." + form[-3:]), **options)
    data = open_data(DataConfig(**many_classes_section(lvis, 1203)))
    assert np.array_equal(data.val[0][1], np.where(values == 0, 65535, values - 1))


def test_values_reach_65535_and_any_value_can_be_ignored(tmp_path):
    root = write_many_classes(tmp_path, 300, first=65236)
    section = many_classes_section(root, 300, values=["65236-65535"], ignore=[0, "7-9"])
    target = np.asarray(open_data(DataConfig(**section)).val[0][1])
    values = values_of(root / "labels/val/e.png")
    # The class whose value is 65535 is no ignored label.
    assert (values == 65535).any() and np.array_equal(target, np.where(values == 0, 65535, values - 65236))
    assert resolve_labels(DataConfig(**section)).ignore == (0, 7, 8, 9)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            {"values": None, "ignore": None},
            ["e.png", "label values 1203 are neither a class (0..1202)", "data.values=[1-1203]", "data.ignore=[0]"],
        ),
        ({"ignore": None}, ["label values 0 are neither a class (1..1203)", "data.ignore"]),
        ({"ignore": [5]}, ["data.ignore: value 5 is the class 'thing 4'"]),
        (
            {"values": None, "ignore": [0]},
            ["data.ignore: value 0 is the class 'thing", "data.values, such as [1-1203]"],
        ),
        ({"values": ["1-1202"]}, ["data.values must list one label value for each of 1203 classes, got 1202"]),
        ({"values": ["1-1202", 7]}, ["data.values: 7 is listed twice"]),
        ({"classes": [f"c{k}" for k in range(65536)], "values": None}, ["2 to 65535 names, got 65536"]),
        ({"classes": ["a"] * 1203}, ["data.classes: 'a' is listed twice"]),
    ],
)
def test_errors_about_many_classes_name_the_setting(lvis, extra, words):
    (lvis / "labels/train").rename(lvis / "labels/other")
    with pytest.raises(UserError) as error:
        open_data(DataConfig(**many_classes_section(lvis, 1203, **extra)), ("val",))
    assert all(word in str(error.value) for word in words), error.value


def test_class_names_come_from_a_file_and_stay_in_the_run(lvis, tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeff Katze\r\nStraße, nass\n[x]\n\n\n".encode())
    config = load_config(None, ["data.name=folder", f"data.classes={file}"])
    file.unlink()
    assert config.data.classes == ["Katze", "Straße, nass", "[x]"] == config.at_step(3).data.classes
    for text, words in (("a\n\nb\n", "line 2 is empty"), ("\n", "line 1 is empty"), ("", "line 1 is empty")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            load_config(None, [f"data.classes={file}"])
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path, tmp_path / "none.txt", "~no-such-user/names.txt", "sky"):
        with pytest.raises(UserError, match=r"--set: data\.classes: wanted a list of names or a text file"):
            load_config(None, [f"data.classes={path}"])


@pytest.mark.parametrize("text", ["[3-1]", "[a]", "[1-70000]", "[-1]", "[1-]"])
def test_wrong_ranges_of_values_are_errors(text):
    with pytest.raises(UserError, match=r"--set: data\.values\.\d: input should be"):
        load_config(None, [f"data.values={text}"])
    assert load_config(None, ["data.values=[0, 4-6, 9]"]).data.values == [0, 4, 5, 6, 9]


# ---- Tensors ----


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_augmentation_moves_wide_labels_like_bytes(mode):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, (40, 56)).astype(np.uint8)
    image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    config = DataConfig(height=32, width=48, scale_min=0.4, scale_max=2, flip=True, max_class_share=0.01)
    wide = Image.fromarray(values.astype(np.int32 if mode == "I" else np.uint16) * 300)
    assert wide.mode == mode
    for seed in range(12):
        pixels, labels = augment(image, Image.fromarray(values), config, np.random.default_rng(seed))
        again, moved = augment(image, wide, config, np.random.default_rng(seed))
        assert labels.dtype == torch.uint8 and moved.dtype == torch.int32 and torch.equal(pixels, again)
        assert torch.equal(moved, torch.where(labels == 255, 65535, labels.int() * 300))


def test_batches_of_many_classes_are_int32(lvis):
    config = tiny_config(data=many_classes_section(lvis, 1203), codes=CODES)
    pairs = open_data(config.data).train
    batch = next(example_batches(pairs, config, workers=0))
    assert batch.labels.dtype == torch.int32 and 0 < batch.labelled == int((batch.labels != 65535).sum())
    assert int(batch.labels[batch.labels != 65535].max()) == 1202 and batch.labelled < batch.labels.numel()
    _, labels, _ = next(training_batches(pairs, config.data, 4, seed=0))
    assert torch.equal(labels, batch.labels)


@pytest.mark.parametrize("size", [(7, 5), (40, 64), (129, 31)])
def test_wide_labels_are_enlarged_like_bytes(size):
    labels = torch.randint(0, 256, (17, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(enlarge_labels(labels.int() * 257, size), enlarge_labels(labels, size).int() * 257)


def test_probabilities_of_many_classes_give_wide_labels():
    scores = torch.rand(300, 6, 8, generator=torch.Generator().manual_seed(0))
    scores[:, 2] = torch.nan
    labels = likeliest(scores)
    assert labels.dtype == torch.int32 and (labels[2] == 65535).all() and int(labels[labels < 65535].max()) > 255
    assert torch.equal(labels[3], scores[:, 3].argmax(0).int())


@pytest.mark.parametrize("upsample", ["codes", "labels", "probabilities"])
@pytest.mark.parametrize("views", [{}, {"flip": True}, {"window": "slide", "resize": "cover"}])
def test_labels_of_every_view_are_the_nearest_codes_of_the_field(upsample, views):
    config = tiny_config(sample={"upsample": upsample, **views}, codes=CODES)
    segmenter = Segmenter(Waves(), build_codebook(config.codes, 300), config)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8))
    field = segmenter.native_field([image])
    wanted, margin = nearest_centroid(field, segmenter.codebook, out_dtype=torch.int32, return_margin=True)
    labels, found_margin = segmenter.labels(image, with_margin=True)
    assert labels.dtype == torch.int32 and torch.equal(labels, wanted[0]) and torch.equal(found_margin, margin[0])
    assert int(labels.max()) > 255 and len(labels.unique()) > 5
    # A network that diverged gives the ignored label and no margin.
    segmenter.model.forward = lambda x, t, image: x * torch.nan
    for ignored in (65535, -1):
        segmenter.codebook.ignore_index = ignored
        labels, margin = segmenter.labels(image, with_margin=True)
        assert (labels == 65535).all() and margin.isnan().all()


def test_palettes_are_distinct_for_any_number_of_classes():
    colors = spread_palette(MOST_CLASSES)
    assert len(set(colors)) == MOST_CLASSES and (0, 0, 0) not in colors and colors[:300] == spread_palette(300)
    # The colours of up to 255 classes are those of earlier versions.
    assert spread_palette(4) == ((255, 64, 64), (51, 96, 204), (105, 153, 38), (255, 64, 231))
    labels = np.array([[0, 65534], [65535, 300]], np.int32)
    assert colorize(labels, colors).tolist() == [[list(colors[0]), list(colors[-1])], [[0, 0, 0], list(colors[300])]]


# ---- Counts ----


def maps(classes, shape, generator):
    """Label maps in which half of the pixels are right, some ignored and some undecided."""
    truth = torch.randint(0, classes, shape, generator=generator, dtype=torch.int32)
    found = torch.where(torch.rand(shape, generator=generator) < 0.5, truth, truth.flip(0))
    truth[: shape[0] // 8] = 65535
    found[:, : shape[1] // 8] = 65535
    return truth, found


def counts_of(classes, images=3):
    """Both kinds of counts of the same label maps, and these maps."""
    generator = torch.Generator().manual_seed(classes)
    both = PairCounts(classes, torch.device("cpu")), ClassCounts(classes, torch.device("cpu"))
    seen = [maps(classes, (64, 90), generator) for _ in range(images)]
    for truth, found in seen:
        for counts in both:
            counts.add(truth, found)
    return *both, seen


@pytest.mark.parametrize(("classes", "device"), [(256, "cpu"), (300, "other"), (1203, "cpu")])
def test_scores_by_class_equal_those_of_the_matrix_and_of_numpy(classes, device, monkeypatch):
    # On a GPU neighbours count in several copies of the matrix.
    monkeypatch.setattr(PairCounts, "_on_cpu", staticmethod(lambda _: device == "cpu"))
    pairs, by_class, seen = counts_of(classes)
    confusion, labelled = pairs.confusion()
    from_pairs = scores_from_confusion(confusion, 3, labelled - confusion.sum(1))
    scores = scores_by_class(by_class.by_class(), 3, by_class.pairs)
    assert torch.equal(from_pairs.counts, scores.counts) and from_pairs.iou == scores.iou and scores.images == 3
    assert (from_pairs.miou, from_pairs.pixel_accuracy) == (scores.miou, scores.pixel_accuracy)
    assert from_pairs.undecided == scores.undecided > 0 and scores.missing_pixels == from_pairs.missing_pixels == 0
    assert scores.most_confused(10**6) == from_pairs.most_confused(10**6) == confused_pairs(confusion, 10**6)
    wanted = numpy_scores(*zip(*((t.numpy(), f.numpy()) for t, f in seen)), classes)
    assert (scores.miou, scores.pixel_accuracy) == pytest.approx(wanted, abs=1e-9) and 10 < scores.miou < 60


def test_confused_pairs_stay_within_their_stated_error():
    classes, generator = 700, torch.Generator().manual_seed(0)
    pairs, wanted = ConfusedPairs(classes, capacity=200), torch.zeros(classes**2, dtype=torch.int64)
    frequent = torch.randint(0, classes**2, (50,), generator=generator)
    for _ in range(30):
        # Forty percent of the pixels are of fifty pairs, the others of random ones.
        codes = torch.randint(0, classes**2, (1000,), generator=generator)
        codes[:400] = frequent[torch.randint(0, 50, (400,), generator=generator)]
        pairs.add(codes // classes, codes % classes)
        wanted += torch.bincount(codes[codes // classes != codes % classes], minlength=classes**2)
    found, missing = pairs.most(50), pairs.missing
    assert 0 < missing < 60 and {true * classes + other for true, other, _ in found} == set(frequent.tolist())
    for true, other, pixels in found:
        assert 0 <= wanted[true * classes + other] - pixels <= missing
    assert [row[2] for row in found] == sorted((row[2] for row in found), reverse=True)


def test_images_without_a_confusion_leave_nothing_to_merge():
    pairs = ConfusedPairs(5)
    for _ in range(3):
        pairs.add(torch.arange(5), torch.arange(5))
    assert pairs._waiting == [] and pairs.most(3) == [] and pairs.missing == 0


def test_evaluation_by_class_adds_up_over_processes(monkeypatch):
    classes, truths, predictions = 3000, [], {}
    generator = torch.Generator().manual_seed(1)
    pairs = Pairs()
    for index in range(5):
        truth, found = maps(classes, (24, 40), generator)
        pairs.append((Image.new("RGB", (40, 24), (index, 0, 0)), Image.fromarray(truth.numpy())))
        truths.append(truth.numpy())
        predictions[index] = found

    segmenter = Segmenter(torch.nn.Identity(), build_codebook(CodesConfig(**CODES), classes), tiny_config(codes=CODES))

    def read(images, native, with_margin=False):
        return ((predictions[image.getpixel((0, 0))[0]], None) for image in images)

    monkeypatch.setattr(segmenter, "seen", lambda image: image)
    monkeypatch.setattr(segmenter, "native_labels", read)
    alone = evaluate(segmenter, pairs)
    assert alone.confusion is None and alone.counts.shape == (3, classes)
    wanted = numpy_scores(truths, [found.numpy() for found in predictions.values()], classes)
    assert (alone.miou, alone.pixel_accuracy) == pytest.approx(wanted, abs=1e-9)
    parts = []
    for rank in range(2):
        evaluate(segmenter, pairs, rank=rank, world=2, add_up=lambda sums: parts.append(sums.clone()) or sums)
    both = evaluate(segmenter, pairs, rank=0, world=2, add_up=lambda sums: parts[0] + parts[1])
    assert (both.images, both.miou, both.iou, both.undecided) == (5, alone.miou, alone.iou, alone.undecided)
    assert torch.equal(both.counts, alone.counts) and both.most_confused(10**5) == alone.most_confused(10**5)
    monkeypatch.setattr(evaluation, "MOST_PAIRED", classes)
    paired = evaluate(segmenter, pairs)
    assert paired.confusion.shape == (classes, classes) and paired.most_confused(10**5) == alone.most_confused(10**5)


MEMORY = """
import sys
import numpy as np, torch
from PIL import Image
from flowseg.codes import build_codebook
from flowseg.config import CodesConfig, DataConfig
from flowseg.data import open_data
from flowseg.inference.counts import ClassCounts
from flowseg.inference.evaluate import scores_by_class
from pathlib import Path
from tests.flowseg.support.many_classes import many_classes_section

def used():
    # Not ru_maxrss, which a process inherits.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

torch.zeros(8).sort()
before = used()
data = open_data(DataConfig(**many_classes_section(Path(sys.argv[1]), 65535)))
target = torch.from_numpy(np.array(data.val[0][1]))
codebook = build_codebook(CodesConfig(channels=8, sequence="r_sequence"), data.num_classes)
codes = codebook.encode(target[None])[0]
assert torch.equal(codes.movedim(0, -1)[target != 65535], codebook.centroids[target[target != 65535].long()])
counts = ClassCounts(65535, torch.device("cpu"))
truth = torch.randint(0, 65535, (512, 512), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
found = truth.roll(1, 0).where(truth % 2 == 0, truth)
for _ in range(2):
    counts.add(truth, found)
scores = scores_by_class(counts.by_class(), 2, counts.pairs)
assert scores.counts[0].sum() == 2 * (truth == found).sum() and int(scores.counts[1].sum()) == 2 * 512 * 512
scores.most_confused(100), scores.missing_pixels
print(used() - before)
"""


def test_65535_classes_need_less_than_200_mb(tmp_path):
    root = write_many_classes(tmp_path, MOST_CLASSES)
    found = subprocess.run([sys.executable, "-c", MEMORY, root], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert 0 < float(found.stdout) < 200


# ---- A run ----


@pytest.mark.parametrize("matrix", [True, False])
def test_a_run_of_1203_classes_trains_evaluates_predicts_and_reports(lvis, tmp_path, monkeypatch, capsys, matrix):
    if not matrix:
        monkeypatch.setattr(evaluation, "MOST_PAIRED", 255)
    config = tiny_config(data=many_classes_section(lvis, 1203), codes=CODES, train={"steps": 3})
    result = train(config, tmp_path / "run")
    assert result.state.step == 3 and result.scores.images == 2
    (lvis / "classes.txt").unlink()
    place = {"--run": tmp_path / "run"}

    def command(name, *arguments):
        status, out, errors = run(
            monkeypatch, capsys, name, *arguments, *(word for pair in place.items() for word in pair)
        )
        assert status == 0, errors
        return out

    command("predict", lvis / "images/val", "--out", tmp_path / "out")
    masks = {path.name[0]: values_of(path) for path in (tmp_path / "out").glob("*.mask.png")}
    assert sorted(masks) == ["e", "f"] and Image.open(tmp_path / "out/e.mask.png").mode == "I;16"
    assert max(mask.max() for mask in masks.values()) < 1203
    overlay = np.asarray(Image.open(tmp_path / "out/e.overlay.png")).astype(int)
    colors = colorize(masks["e"], spread_palette(1203)).astype(int)
    assert np.abs(2 * overlay - colors - np.asarray(Image.open(lvis / "images/val/e.png"))).max() <= 2

    # An untrained network is right nowhere. Make it right in two thirds of each image, so that the scores are not 0.
    truths = []
    for name, suffix in (("e", "png"), ("f", "tif")):
        truth = masks[name] + 1
        truth[-8:] = values_of(lvis / f"labels/val/{name}.{suffix}")[-8:]
        truth[0] = 0
        Image.fromarray(truth.astype(np.uint16)).save(lvis / f"labels/val/{name}.{suffix}")
        truths.append(np.where(truth == 0, 65535, truth - 1))
    out = command("evaluate", "--json", tmp_path / "scores.json")
    facts = json.loads((tmp_path / "scores.json").read_text())
    wanted = numpy_scores(truths, [masks["e"], masks["f"]], 1203)
    assert (facts["miou"], facts["pixel_accuracy"]) == pytest.approx(wanted, abs=1e-9) and 1 < facts["miou"] < 99
    assert "most frequent of 1203" in out and f"{facts['miou']:.2f}" in out and len(out.splitlines()) < 50
    assert "confusion" not in facts and sum(facts["truths"]) == sum((truth < 1203).sum() for truth in truths)
    wrong = sum(int((mask != truth)[truth < 1203].sum()) for mask, truth in zip(masks.values(), truths))
    assert sum(pixels for _, _, pixels in facts["confused"]) == wrong and facts["confused_missing_pixels"] == 0

    place.clear()
    command("report", tmp_path / "run", "--no-speed")
    html = (tmp_path / "run/report.html").read_text()
    assert f"{facts['miou']:.1f} %" in html and "<input type='search'" in html and "The counts are exact." in html
    assert "1203 items: thing 0, thing 1, " in html and html.count("thing 700") == 1
    (rows,) = re.findall(r"<script type='application/json'>(.*?)</script>", html, re.S)
    rows = json.loads(rows)
    assert len(rows) == 1203 and html.count("<tr>") < 200 and len(html) < 2e6
    assert dict(zip((row[0] for row in rows), (row[1] for row in rows))) == {
        name: "absent" if iou is None else f"{iou:.1f}" for name, iou in facts["iou"].items()
    }


def test_a_softmax_head_of_300_classes_trains(tmp_path):
    root = write_many_classes(tmp_path / "data", 300)
    config = tiny_config(
        data=many_classes_section(root, 300), codes={"channels": 300, "sequence": "one_hot"},
        loss={"kind": "cross_entropy"}, flow={"zero_fraction": 1.0}, train={"steps": 1}, sample={"steps": 1},
    )  # fmt: skip
    assert train(config, tmp_path / "run").state.step == 1
    (line,) = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["event"] == "train"]
    # Scores near 0 for 300 classes: the loss of a pixel is log(300) = 5.7. With ignored pixels in it, it would be an error.
    assert 5 < line["loss"] < 7


def test_a_shared_folder_of_many_classes_loads(lvis, tmp_path):
    from flowseg.checkpoint import read_run_config
    from flowseg.hub import from_pretrained, save_pretrained

    train(tiny_config(data=many_classes_section(lvis, 1203), codes=CODES, train={"steps": 1}), tmp_path / "run")
    segmenter = Segmenter.from_run(tmp_path / "run", read_run_config(tmp_path / "run"))
    loaded = from_pretrained(save_pretrained(segmenter, tmp_path / "shared"))
    image = lvis / "images/val/e.png"
    labels, margin = loaded.labels(image, with_margin=True)
    assert labels.dtype == torch.int32 and torch.equal(labels, segmenter.labels(image)) and margin.min() >= 0
    card = (tmp_path / "shared/README.md").read_text()
    settings = tmp_path / "shared/config.json"
    settings.write_text(settings.read_text().replace('"classes": [', '"classes": "/etc/hosts", "x": [', 1))
    with pytest.raises(UserError, match=r"data\.classes is not a list"):
        from_pretrained(tmp_path / "shared")
    assert "and 948 more, in `config.json`" in card and "(H, W) int32" in card and "1203 classes" in card


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_search_box_finds_rows(tmp_path):
    rows = [[f"thing {k} </script>", f"{k}"] for k in range(500)]
    html = search_table(["class", "IoU"], rows, shown=20)
    (data, code) = re.search(
        r"<script type='application/json'>(.*?)</script><script>(.*?)</script>", html, re.S
    ).groups()
    assert html.count("<tr>") == 21 and "20 of 500" in html
    stub = """
    const make = () => ({children: [], append(x) { this.children.push(x) }, replaceChildren(...x) { this.children = x }});
    const parts = {input: {value: '', addEventListener: (_, f) => { parts.input.go = f }}, tbody: make(), span: {}};
    const box = {querySelector: (name) => parts[name]};
    globalThis.document = {currentScript: {previousElementSibling: {parentElement: box, textContent: DATA}}, createElement: make};
    CODE
    for (const word of [' THING 49', 'script>', 'nothing']) {
      parts.input.value = word; parts.input.go();
      const cells = parts.tbody.children.map((row) => row.children.map((cell) => cell.textContent));
      console.log(JSON.stringify([parts.span.textContent, cells]));
    }"""
    source = stub.replace("DATA", json.dumps(data)).replace("CODE", code)
    found = subprocess.run(["node", "-"], input=source, capture_output=True, text=True)
    some, many, none = map(json.loads, io.StringIO(found.stdout))
    assert some == ["11 of 11", [rows[k] for k in (49, *range(490, 500))]]
    assert many == ["20 of 500", rows[:20]] and none == ["0 of 0", []]
