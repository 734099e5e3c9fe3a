"""``sample.cuda_graph``: what is recorded, when, and for how long. The last test records on a GPU."""

import copy
import gc
import weakref

import pytest
import torch

from flowseg.inference import graphs
from flowseg.inference.graphs import Graphs
from flowseg_kernels import use_backend

from .support.random_networks import assigned, images, loaded, plain_sample, random_segmenter, written


class Recorder:
    """Stands for CUDA's recording: a replay computes from the fixed inputs into the fixed output."""

    def __init__(self):
        self.recorded, self.replays = [], 0

    def __call__(self, function, inputs):
        with torch.inference_mode(False):
            output = function(*inputs).clone()
        self.recorded.append(tuple(inputs[0].shape))

        def replay():
            self.replays += 1
            output.copy_(function(*inputs))

        return replay, output


@pytest.fixture
def recorder(monkeypatch):
    one = Recorder()
    monkeypatch.setattr(graphs, "record", one)
    return one


def graphed(**sections):
    """A segmenter on the CPU that records as if it were on a GPU."""
    segmenter = random_segmenter(sample={"steps": 3, "cuda_graph": True}, **sections)
    segmenter._records_graphs = lambda: segmenter.config.sample.cuda_graph
    return segmenter


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("source", ["image", "noise"])
def test_a_size_is_recorded_the_second_time_and_replayed_with_new_images(recorder, precision, source):
    sections = {"train": {"mixed_precision": precision}, "flow": {"source": source}}
    segmenter, eager = graphed(**sections), random_segmenter(**sections)
    results = []
    for round in range(4):
        pixels = images() * (0.5 + round / 8)
        results.append((segmenter.sample(pixels, seed=round), eager.sample(pixels, seed=round)))
        assert len(recorder.recorded) == min(round, 1) and recorder.replays == round
    # Compare at the end: a replay must not write to the results of earlier ones.
    assert all(torch.equal(found, wanted) for found, wanted in results)
    assert not torch.equal(results[2][0], results[3][0])


def test_each_batch_size_and_number_of_steps_has_its_own_graph(recorder):
    segmenter = graphed()
    for _ in range(3):
        for pixels, steps in ((images(2), 3), (images(1), 3), (images(2, 16, 16), 3), (images(2), 2)):
            segmenter.sample(pixels, steps=steps)
    assert len(recorder.recorded) == 4 and recorder.replays == 8
    segmenter.config.sample.method = "midpoint"
    found = [segmenter.sample(images()) for _ in range(2)][-1]
    assert len(recorder.recorded) == 5 and torch.equal(found, plain_sample(segmenter, images()))


def test_each_backend_and_each_stream_has_its_own_graph(recorder, monkeypatch):
    segmenter = graphed()
    for _ in range(2):
        segmenter.sample(images())
    with use_backend("reference"):
        for _ in range(3):
            segmenter.sample(images())
    assert len(recorder.recorded) == 2 and recorder.replays == 3
    monkeypatch.setattr(graphs, "_current_stream", lambda device: "a second stream")
    for _ in range(3):
        assert torch.equal(segmenter.sample(images()), plain_sample(segmenter, images()))
    assert len(recorder.recorded) == 3 and recorder.replays == 5


def test_graphs_of_inference_mode_serve_outside_of_it(recorder):
    segmenter = graphed()
    with torch.inference_mode():
        for _ in range(2):
            segmenter.sample(images() / 2)
    assert torch.equal(segmenter.sample(images()), plain_sample(segmenter, images())) and recorder.replays == 2
    segmenter.free_graphs()
    assert not segmenter._graphs._recorded


@pytest.mark.parametrize("change", [loaded, written])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_graph_stays_valid_when_weights_change_in_place(recorder, change, precision):
    segmenter = graphed(train={"mixed_precision": precision})
    before = [segmenter.sample(images()) for _ in range(2)][-1]
    change(segmenter)
    after = segmenter.sample(images())
    assert len(recorder.recorded) == 1 and recorder.replays == 2
    assert torch.equal(after, plain_sample(segmenter, images())) and not torch.equal(after, before)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_replaced_weights_are_recorded_again(recorder, precision):
    segmenter = graphed(train={"mixed_precision": precision})
    for _ in range(2):
        segmenter.sample(images())
    assigned(segmenter)
    for _ in range(2):
        assert torch.equal(segmenter.sample(images()), plain_sample(segmenter, images()))
    assert len(recorder.recorded) == 2
    segmenter.refresh()
    assert not segmenter._graphs._recorded


def test_the_graph_used_least_recently_goes_first(recorder):
    kept, function = Graphs(), torch.neg
    freed = []

    def run(size):
        return kept.run("owner", "key", function, torch.full((size,), float(size)))

    for size in range(1, 9):
        for _ in range(2):
            assert run(size).tolist() == [-size] * size
    inputs = [entry[0][0] for entry in kept._recorded.values()]
    for size, one in zip(range(1, 9), inputs):
        weakref.finalize(one, freed.append, size)
    del inputs, one
    run(1)
    run(9), run(9)
    gc.collect()
    assert len(recorder.recorded) == 9 and len(kept._recorded) == Graphs.MOST == 8 and freed == [2]
    kept.clear()
    gc.collect()
    assert sorted(freed) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_sizes_that_never_return_are_not_recorded(recorder):
    kept = Graphs()
    for size in range(1, 600):
        kept.run("owner", "key", torch.neg, torch.zeros(size))
    assert not recorder.recorded and len(kept._called) <= Graphs._MOST_KEYS


def test_states_networks_with_hooks_and_other_devices_are_not_recorded(recorder):
    segmenter = graphed()
    for _ in range(3):
        field, path = segmenter.sample(images(), keep_path=True)
    assert torch.equal(path[-1][1], field) and len(path) == 4
    segmenter.model.blocks[0].register_forward_hook(lambda *_: None)
    for _ in range(3):
        segmenter.sample(images())
    on_cpu = random_segmenter(sample={"cuda_graph": True})
    for _ in range(3):
        on_cpu.sample(images())
    assert not recorder.recorded


def test_the_setting_is_off_by_default(recorder):
    segmenter = graphed()
    segmenter.config.sample.cuda_graph = False
    for _ in range(3):
        segmenter.sample(images())
    assert not recorder.recorded and not random_segmenter().config.sample.cuda_graph


def test_a_segmenter_with_graphs_can_be_copied(recorder):
    segmenter = graphed()
    for _ in range(2):
        segmenter.sample(images())
    assert not copy.deepcopy(segmenter._graphs)._recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, which records CUDA graphs")
@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("source", ["image", "noise"])
def test_a_recorded_loop_gives_the_same_bits_on_a_gpu(precision, source):
    sections = {"train": {"mixed_precision": precision}, "flow": {"source": source}}
    segmenter, eager = (
        random_segmenter("cuda", sample={"steps": 3, "cuda_graph": on}, **sections) for on in (True, False)
    )
    for round in range(4):
        pixels = images() * (0.5 + round / 8)
        assert torch.equal(segmenter.sample(pixels, seed=round), eager.sample(pixels, seed=round))
    assert len(segmenter._graphs._recorded) == 1
    for one in (segmenter, eager):
        written(one)
    assert torch.equal(segmenter.sample(pixels), eager.sample(pixels)) and len(segmenter._graphs._recorded) == 1
