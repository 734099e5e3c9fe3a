"""Evaluation reads ahead: in order, within a bound of pixels, errors at their turn, and no thread is left behind."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flowseg.data import open_data
from flowseg.data.pictures import read_values
from flowseg.data.transforms import normalised, pad_to, to_tensor
from flowseg.errors import UserError
from flowseg.inference import evaluate as evaluation
from flowseg.inference import read_ahead as reading
from flowseg.inference.counts import PairCounts
from flowseg.inference.evaluate import evaluate
from flowseg.inference.read_ahead import LargeOneByOne, read_ahead, reading_threads
from flowseg.runs import machine

from .support.networks import Pairs, make_pairs, oracle_segmenter
from .support.processes import wait_until
from .tiny import folder_section, tiny_config


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flowseg-read")]


class Log:
    """A load function that records what is loaded, and how many items are loaded and not consumed."""

    def __init__(self, delays=()):
        self.started, self.consumed, self.most, self.delays = [], 0, 0, dict(delays)
        self.lock = threading.Lock()

    def __call__(self, item):
        with self.lock:
            self.started.append(item)
            self.most = max(self.most, len(self.started) - self.consumed)
        time.sleep(self.delays.get(item, 0))
        return item

    def consume(self, iterator):
        for item in iterator:
            with self.lock:
                self.consumed += 1
            yield item


@pytest.mark.parametrize("overlap", [True, False])
def test_items_come_in_order_whatever_thread_is_first(overlap):
    load = Log({0: 0.05, 3: 0.05, 4: 0.02})
    found = list(read_ahead(range(20), load, lambda item: 1, threads=4, most=6, overlap=overlap))
    assert found == list(range(20)) and not readers()


def test_the_next_items_are_loaded_while_the_caller_computes():
    load = Log()
    loaded = read_ahead(range(20), load, lambda item: 1, threads=2, most=3)
    assert next(loaded) == 0
    # The caller computes here, and asks for nothing.
    wait_until(lambda: len(load.started) >= 4)
    assert sorted(load.started) == [0, 1, 2, 3]
    loaded.close()
    assert not readers() and len(load.started) == 4


def test_without_overlap_nothing_is_loaded_while_the_caller_computes():
    load = Log()
    loaded = read_ahead(range(20), load, lambda item: 1, threads=2, most=3, overlap=False)
    # The first item is loaded alone, as its size is not known; then three at a time.
    for count, wanted in enumerate((0, 1, 2, 3)):
        assert next(loaded) == wanted
        if count in (0, 3):
            started = sorted(load.started)
            time.sleep(0.02)
            assert sorted(load.started) == started
    loaded.close()


@pytest.mark.parametrize(("pixels", "most"), [(1, 8), (25, 4), (60, 1), (101, 1)])
def test_pixels_bound_what_is_read_ahead(pixels, most):
    load = Log()
    loaded = read_ahead(range(30), load, lambda item: pixels, threads=8, most=8, budget=100)
    assert list(load.consume(loaded)) == list(range(30))
    # One item more: the one that the caller has just received.
    assert load.most <= most + 1


class Held:
    """A load function of items that are sizes; it records the largest sum of sizes that are loaded and not consumed."""

    def __init__(self):
        self.now, self.most, self.lock = 0, 0, threading.Lock()

    def __call__(self, size):
        time.sleep(0.001)
        with self.lock:
            self.now += size
            self.most = max(self.most, self.now)
        return size

    def run(self, items, **options):
        loaded = read_ahead(items, self, lambda size: size, threads=4, most=20, budget=2000, **options)
        for count, size in enumerate(loaded):
            assert size == items[count]
            # The caller computes, and the threads load as much as they may.
            time.sleep(0.005)
            with self.lock:
                self.now -= size
        assert count + 1 == len(items)
        return self.most


@pytest.mark.parametrize("overlap", [True, False])
def test_mixed_sizes_keep_within_the_bound(overlap):
    for items in ([1] + [1000] * 20, [1, 1000] * 10, [10, 10, 1500, 10, 700, 700, 700]):
        # One item more: the one that the caller has just received.
        assert Held().run(items, overlap=overlap, sizes=lambda size: size) <= 2000 + max(items)
    # An image that is larger than the bound comes with nothing but the images before it.
    assert Held().run([10, 5000, 10, 5000, 10], overlap=overlap, sizes=lambda size: size) <= 5020


@pytest.mark.parametrize("overlap", [True, False])
def test_sizes_that_are_not_known_count_as_the_largest_so_far(overlap):
    def unknown(size):
        raise OSError("no header")

    for options in ({}, {"sizes": unknown}):
        assert Held().run([1000] + [1, 1000, 1000, 1000] * 5, overlap=overlap, **options) <= 3000


def test_evaluation_asks_the_pairs_for_the_sizes_of_the_next_images(monkeypatch):
    class Sized(Pairs):
        def pixels(self, index):
            asked.append(index)
            return self[index][0].width * self[index][0].height

    asked = []
    seen = []
    real = evaluation.read_ahead
    monkeypatch.setattr(
        evaluation, "read_ahead", lambda *args, **options: seen.append(options) or real(*args, **options)
    )
    pairs = Sized(make_pairs([(32, 32), (32, 64), (32, 32)]))
    assert evaluate(oracle_segmenter(), pairs).images == 3
    assert [seen[0]["sizes"](index) for index in range(3)] == [1024, 2048, 1024]
    # A header is read once, although the thread asks again.
    assert sorted(asked) == [0, 1, 2]


def test_without_threads_the_caller_loads_each_item_at_its_turn():
    load, names = Log(), []

    def named(item):
        names.append(threading.current_thread().name)
        return load(item)

    loaded = read_ahead(range(5), named, lambda item: 1, threads=0, most=4)
    for count, item in enumerate(loaded):
        assert item == count and load.started == list(range(count + 1)) and not readers()
    assert set(names) == {threading.current_thread().name} and count == 4


def test_no_workers_evaluate_without_a_thread_and_count_the_same(monkeypatch):
    pairs = make_pairs([(32, 32), (32, 48), (32, 48), (32, 32)])
    wanted = evaluate(oracle_segmenter(sample={"batch_size": 2}), pairs).confusion
    segmenter = oracle_segmenter(sample={"batch_size": 2})
    segmenter.config.data.workers = 0
    monkeypatch.setattr(reading, "ThreadPoolExecutor", None)
    assert torch.equal(evaluate(segmenter, pairs).confusion, wanted)


def test_large_images_are_read_one_at_a_time(monkeypatch):
    monkeypatch.setattr(reading, "LARGE_PIXELS", 100)
    inside, most = [], []

    class Sized:
        def pixels(self, index):
            return 101 if index else 100

    large = LargeOneByOne(Sized())

    def load(index):
        with large.reading(index):
            inside.append(index)
            most.append(len([one for one in inside if one]))
            time.sleep(0.002)
            inside.remove(index)
        return index

    assert list(read_ahead(range(1, 12), load, lambda _: 1, threads=4, most=8)) == list(range(1, 12))
    assert max(most) == 1
    with large.reading(0), large.reading(0), large.reading(1):
        pass


class Broken(Pairs):
    def __getitem__(self, index):
        if index == 3:
            raise UserError("photo.jpg: cannot be read as an image")
        return super().__getitem__(index)


def test_an_error_of_a_file_is_raised_at_its_turn_and_leaves_no_thread():
    done = []
    segmenter = oracle_segmenter(sample={"batch_size": 2})
    with pytest.raises(UserError, match=r"photo\.jpg"):
        evaluate(segmenter, Broken(make_pairs([(32, 32)] * 8)), on_batch=done.append)
    # The batch of images 0 and 1 was complete before image 3 was needed.
    assert done == [2] and not readers()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overlap", [True, False])
def test_an_interrupted_evaluation_leaves_no_thread(error, overlap, monkeypatch):
    begun = []

    class Counted(Pairs):
        def __getitem__(self, index):
            begun.append(index)
            return super().__getitem__(index)

    def stop(count):
        raise error

    real = evaluation.read_ahead
    monkeypatch.setattr(
        evaluation, "read_ahead", lambda *args, **options: real(*args, **{**options, "overlap": overlap})
    )
    with pytest.raises(error):
        evaluate(oracle_segmenter(sample={"batch_size": 2}), Counted(make_pairs([(32, 32)] * 40)), on_batch=stop)
    assert not readers() and len(begun) < 20


def test_reading_ahead_gives_the_counts_of_one_thread_for_mixed_sizes(monkeypatch):
    pairs = make_pairs([(32, 32), (32, 32), (32, 48), (64, 64), (64, 64), (64, 64), (32, 32)] * 3)
    segmenter = oracle_segmenter(sample={"batch_size": 2})
    sizes = []
    found = evaluate(segmenter, pairs, on_batch=sizes.append)
    assert sizes[:5] == [2, 1, 2, 1, 2] and sum(sizes) == found.images == 21
    monkeypatch.setattr(evaluation, "reading_threads", lambda config: 1)
    assert torch.equal(evaluate(segmenter, pairs).confusion, found.confusion)


def test_the_number_of_threads_is_that_of_data_workers_or_of_the_cores(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert reading_threads(tiny_config(data={"workers": 3}).data) == 3
    assert reading_threads(tiny_config().data) == 6
    assert reading_threads(tiny_config(data={"workers": 0}).data) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert reading_threads(tiny_config().data) == 1


@pytest.mark.parametrize("classes", [2, 11, 150, 255])
@pytest.mark.parametrize("device", ["cpu", "other"])
def test_pairs_are_counted_exactly(classes, device, monkeypatch):
    values = torch.tensor([*range(classes), 255], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(classes)
    truth, predicted = values[torch.randint(len(values), (2, 700, 800), generator=generator)]
    truth[:300], predicted[:200, :300] = 1, 0
    with monkeypatch.context() as patch:
        if device == "other":
            # The way of a GPU, on which bincount reads a value back.
            patch.setattr(PairCounts, "_on_cpu", staticmethod(lambda device: False))
            patch.delattr(torch, "bincount")
        counts = PairCounts(classes, torch.device("cpu"))
        for _ in range(2):
            counts.add(truth, predicted)
        confusion, labelled = counts.confusion()
    wanted = 2 * torch.bincount(truth.flatten().long() * 256 + predicted.flatten(), minlength=65536).view(256, 256)
    assert torch.equal(confusion, wanted[:classes, :classes])
    assert torch.equal(labelled, wanted[:classes].sum(1)) and confusion.dtype == torch.int64


def test_bytes_are_normalised_and_padded_on_the_device_to_the_same_bits():
    pixels = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    image = Image.fromarray(pixels)
    batch = normalised(torch.from_numpy(np.stack([pixels, pixels])).permute(0, 3, 1, 2))
    assert torch.equal(batch, torch.stack([to_tensor(image)] * 2)) and batch.dtype == torch.float32
    assert torch.equal(pad_to(batch, 24, 20)[1], pad_to(to_tensor(image), 24, 20))
    narrow = image.crop((0, 0, 13, 16))
    segmenter = oracle_segmenter()
    patched = segmenter._patched([narrow, narrow])
    assert patched.shape == (2, 3, 16, 16) and torch.equal(patched[1], pad_to(to_tensor(narrow), 16, 16))


def test_label_tables_of_bytes_equal_those_of_any_depth(folder_data):
    config = tiny_config(data=folder_section(folder_data)).data
    pairs = open_data(config).val
    for index in range(len(pairs)):
        image, target = pairs[index]
        assert pairs.pixels(index) == image.width * image.height
        values, _ = read_values(pairs.labels[index], pairs._reading)
        assert np.array_equal(np.asarray(target), pairs._table.astype(np.uint8)[values])
