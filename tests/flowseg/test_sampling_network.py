"""Sampling with weights that are cast once: the same bits, fewer casts, and never an old weight."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._inductor.exc import TritonMissing
from torch.utils._python_dispatch import TorchDispatchMode

from flowseg.data import open_data
from flowseg.errors import CompilerWarning, UserError
from flowseg.inference import network as sampling
from flowseg.inference.evaluate import evaluate
from flowseg.segment import Segmenter
from flowseg.training import trainer as training
from flowseg_kernels import Codebook

from .support.commands import run
from .support.random_networks import assigned, images, loaded, plain_sample, random_segmenter, written
from .tiny import tiny_config


@pytest.mark.parametrize(
    "model",
    [{}, {"stem_width": 8}, {"field_chunk": 2}, {"field_depth": 2, "activation_checkpointing": True}],
    ids=["linear", "stem", "chunks", "depth"],
)
def test_the_copy_samples_the_same_bits(model):
    segmenter = random_segmenter(model=model)
    pixels = images()
    assert torch.equal(segmenter.sample(pixels), plain_sample(segmenter, pixels))
    assert segmenter._network._copy is not None
    assert all(value.dtype == torch.float32 for value in segmenter.model.parameters())


@pytest.mark.parametrize("sample", [{"window": "slide", "resize": "native"}, {"flip": True, "scales": [1.0, 2.0]}])
def test_labels_of_views_are_the_same_with_and_without_the_copy(sample, monkeypatch):
    from PIL import Image

    segmenter = random_segmenter(sample=sample)
    pixels = (images(1, 40, 56)[0].movedim(0, -1) * 127 + 128).byte().numpy()
    with_copy = segmenter.labels(Image.fromarray(pixels))
    monkeypatch.setattr(sampling, "_modules_and_tensors", lambda model: None)
    assert torch.equal(segmenter.labels(Image.fromarray(pixels)), with_copy) and len(with_copy.unique()) > 1
    assert segmenter._network._copy is None


class Casts(TorchDispatchMode):
    """Counts casts of float32 tensors that are parameters of a network."""

    def __init__(self, model):
        super().__init__()
        self.sizes, self.count = {tuple(value.shape) for value in model.parameters() if value.ndim > 1}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A cast arrives as aten.to below autograd, which ops that need no gradient leave out.
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype) and args[0].dtype == torch.float32:
            self.count += tuple(args[0].shape) in self.sizes
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_and_not_at_each_evaluation():
    segmenter = random_segmenter()
    segmenter.sample(images())
    with Casts(segmenter.model) as after:
        segmenter.sample(images())
    with Casts(segmenter.model) as before:
        plain_sample(segmenter, images())
    layers = sum(isinstance(module, nn.Linear) for module in segmenter.model.modules())
    assert after.count == 0 and before.count >= 3 * layers


def _data_replaced(segmenter):
    for value in segmenter.model.parameters():
        value.data = value.data * 1.1


def _module_replaced(segmenter):
    block = copy.deepcopy(segmenter.model.blocks[0])
    with torch.no_grad():
        block.modulation.bias.add_(0.2)
    segmenter.model.blocks[0] = block


def _norm_written(segmenter):
    with torch.no_grad():
        segmenter.model.blocks[0].attention_norm.weight.mul_(1.5)


def _model_replaced(segmenter):
    segmenter.model = copy.deepcopy(segmenter.model)
    written(segmenter)


def _buffer_written(segmenter):
    segmenter.model.time_embed.frequencies.mul_(1.5)


def _data_written(segmenter):
    for value in segmenter.model.parameters():
        value.data.mul_(1.1)


def _data_copied(segmenter):
    for value in segmenter.model.parameters():
        value.data.copy_(value.detach() * 1.1)


def _averaged_into_data(segmenter):
    for value in segmenter.model.parameters():
        torch.lerp(value.data, value.detach() * 1.2, 0.5, out=value.data)


def _written_by_numpy(segmenter):
    for value in segmenter.model.parameters():
        value.detach().numpy()[...] *= 1.1


def _attribute_set(segmenter):
    segmenter.model.blocks[0].attention_norm.eps = 0.5
    segmenter.refresh()


def _written_in_inference_mode(segmenter):
    with torch.inference_mode():
        for value in segmenter.model.parameters():
            value.mul_(1.1)


CHANGES = [
    loaded, assigned, written, _data_replaced, _module_replaced, _norm_written, _model_replaced, _buffer_written,
    _data_written, _data_copied, _averaged_into_data, _written_by_numpy, _attribute_set, _written_in_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_follows_every_change_of_the_network(change):
    segmenter = random_segmenter()
    pixels = images()
    before = segmenter.sample(pixels)
    change(segmenter)
    after = segmenter.sample(pixels)
    assert torch.equal(after, plain_sample(segmenter, pixels)) and not torch.equal(after, before)


def test_a_copy_that_was_made_in_inference_mode_follows_too():
    segmenter = random_segmenter()
    with torch.inference_mode():
        before = segmenter.sample(images())
    written(segmenter)
    after = segmenter.sample(images())
    assert torch.equal(after, plain_sample(segmenter, images())) and not torch.equal(after, before)


def test_a_network_that_was_made_in_inference_mode_is_followed():
    with torch.inference_mode():
        segmenter = random_segmenter()
        before = segmenter.sample(images())
        written(segmenter)
    after = segmenter.sample(images())
    assert segmenter._network._copy is not None
    assert torch.equal(after, plain_sample(segmenter, images())) and not torch.equal(after, before)


def test_threads_share_one_copy():
    segmenter = random_segmenter()
    wanted = plain_sample(segmenter, images())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: segmenter.sample(images()), range(8)))
    assert all(torch.equal(one, wanted) for one in found)
    written(segmenter)
    assert torch.equal(segmenter.sample(images()), plain_sample(segmenter, images()))


def test_a_change_in_place_keeps_the_memory_of_the_copy():
    segmenter = random_segmenter()
    segmenter.sample(images())
    places = [value.data_ptr() for value in segmenter._network._copy.parameters()]
    number = segmenter._network.structure
    written(segmenter)
    segmenter.sample(images())
    assert [value.data_ptr() for value in segmenter._network._copy.parameters()] == places
    assert segmenter._network.structure == number
    assigned(segmenter)
    segmenter.sample(images())
    assert segmenter._network.structure != number


def test_a_network_with_hooks_or_foreign_modules_runs_itself():
    segmenter = random_segmenter()
    calls = []
    handle = segmenter.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    segmenter.sample(images())
    assert len(calls) == 3 and segmenter._network._copy is None and segmenter._network.structure == 0
    handle.remove()
    segmenter.sample(images())
    assert len(calls) == 3 and segmenter._network._copy is not None

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.seen = layer, set()

        def forward(self, x):
            self.seen.add(self.layer.weight.dtype)
            return self.layer(x)

    segmenter.model.blocks[0].attention.out = adapter = Adapter(segmenter.model.blocks[0].attention.out)
    segmenter.sample(images())
    assert adapter.seen == {torch.float32}


def test_float32_makes_no_copy_and_memory_is_two_bytes_per_cast_number():
    segmenter = random_segmenter(train={"mixed_precision": "no"})
    segmenter.sample(images())
    assert segmenter._network._copy is None
    segmenter = random_segmenter()
    segmenter.sample(images())
    shared = {value.data_ptr() for value in segmenter.model.parameters()}
    own = [value for value in segmenter._network._copy.parameters() if value.data_ptr() not in shared]
    layers = [module for module in segmenter.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    numbers = sum(value.numel() for layer in layers for value in layer.parameters())
    assert sum(value.numel() * value.element_size() for value in own) == 2 * numbers


def test_a_segmenter_can_be_copied_and_pickled_after_sampling():
    segmenter = random_segmenter()
    expected = segmenter.sample(images())
    for again in (copy.deepcopy(segmenter), pickle.loads(pickle.dumps(segmenter))):
        assert again._network._copy is None and torch.equal(again.sample(images()), expected)
    assert isinstance(segmenter.codebook, Codebook)


def test_sampling_compiles_the_training_size_only(monkeypatch):
    compilations, calls = [], []

    def pretended(network):
        compilations.append(network)
        return lambda *inputs: calls.append(inputs[0].shape) or network(*inputs)

    monkeypatch.setattr(sampling, "compiled", pretended)
    segmenter = random_segmenter()
    segmenter.compiled = True
    for size in ((16, 16), (16, 24), (16, 16)):
        pixels = images(2, *size)
        assert torch.equal(segmenter.sample(pixels), plain_sample(segmenter, pixels))
    assert compilations == [segmenter._network._copy] and [tuple(shape[2:]) for shape in calls] == [(16, 16)] * 6
    written(segmenter)
    segmenter.sample(images(2, 16, 16))
    assert len(compilations) == 1
    segmenter.compiled = False
    segmenter.sample(images(2, 16, 16))
    assert len(calls) == 9


def test_the_compiled_network_compiles_twice_for_all_batches_and_once_for_a_single_image(monkeypatch):
    backend = EagerAndRecordGraphs()
    monkeypatch.setattr(sampling, "compiled", lambda network: torch.compile(network, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    segmenter = random_segmenter()
    segmenter.compiled = True
    for batch, most in ((4, 1), (3, 2), (2, 2), (5, 2), (4, 2), (1, 3), (2, 3), (1, 3)):
        pixels = images(batch, 16, 16)
        torch.testing.assert_close(segmenter.sample(pixels), plain_sample(segmenter, pixels))
        assert 1 <= len(backend.graphs) <= most, f"a batch of {batch} compiled again"


def test_training_and_evaluate_compile_where_the_settings_say_so_and_predict_never(tmp_path, monkeypatch, capsys):
    from PIL import Image

    compilations = []
    monkeypatch.setattr(training, "_compiled", lambda model, sharded: model)
    monkeypatch.setattr(sampling, "compiled", lambda network: compilations.append(network) or network)
    config = tiny_config(model={"compile": True}, train={"steps": 2, "eval_every": 1, "mixed_precision": "bf16"})
    training.train(config, tmp_path / "run")
    # Two validations sample one network, and the copy follows its averages.
    assert len(compilations) == 1
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    run_folder = ("--run", tmp_path / "run")
    assert run(monkeypatch, capsys, "predict", tmp_path / "a.png", *run_folder, "--out", tmp_path / "out")[0] == 0
    assert run(monkeypatch, capsys, "evaluate", *run_folder, "--set", "model.compile=false")[0] == 0
    assert len(compilations) == 1
    assert run(monkeypatch, capsys, "evaluate", *run_folder)[0] == 0 and len(compilations) == 2


@pytest.fixture
def no_compiler():
    """torch.compile finds no C++ compiler, also in its caches."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        yield
    torch._dynamo.reset()


def test_without_a_compiler_sampling_says_so_once_and_runs_uncompiled(no_compiler):
    segmenter = random_segmenter()
    segmenter.compiled = True
    pixels = images(2, 16, 16)
    words = r"runs uncompiled.*No working C\+\+ compiler.*model\.compile=false"
    with pytest.warns(CompilerWarning, match=words) as said:
        found = [segmenter.sample(pixels) for _ in range(2)]
    (message,) = [str(one.message) for one in said.list if one.category is CompilerWarning]
    assert "\n" not in message
    assert all(torch.equal(one, plain_sample(segmenter, pixels)) for one in found)


def _no_c_compiler():
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def _no_triton():
    raise TritonMissing(None)


def _other_error():
    raise RuntimeError("a kernel failed")


@pytest.mark.parametrize(
    ("failure", "words"), [(_no_c_compiler, "Failed to find C compiler"), (_no_triton, "working triton installation")]
)
def test_evaluate_and_training_without_a_compiler(failure, words, tmp_path, monkeypatch, capsys):
    config = tiny_config(model={"compile": True}, train={"steps": 1})
    monkeypatch.setattr(training, "_compiled", lambda model, sharded: model)
    monkeypatch.setattr(sampling, "compiled", lambda network: network)
    training.train(config, tmp_path / "run")
    monkeypatch.setattr(sampling, "compiled", lambda network: lambda *inputs: failure())
    code, out, err = run(monkeypatch, capsys, "evaluate", "--run", tmp_path / "run")
    assert (
        code == 0 and err.count(words) == 1 and "Traceback" not in err and "uncompiled" in err and "mIoU" in out + err
    )

    monkeypatch.setattr(training, "flow_step", lambda *arguments: failure())
    with pytest.raises(UserError, match=rf"model\.compile: .*{words}.*--set model\.compile=false"):
        training.train(config, tmp_path / "second")
    monkeypatch.setattr(sampling, "compiled", lambda network: lambda *inputs: _other_error())
    with pytest.raises(RuntimeError, match="a kernel failed"):
        Segmenter.from_run(tmp_path / "run", config, compiled=True).sample(images(1, 16, 16))


def test_validation_scores_the_newest_averages(tmp_path):
    config = tiny_config(train={"mixed_precision": "bf16", "steps": 4, "eval_every": 2}, optim={"lr": 0.05})
    seen = []

    def scored(step, scores):
        seen.append(scores.confusion)

    training.train(config, tmp_path / "run", on_validation=scored)
    segmenter = Segmenter.from_run(tmp_path / "run", config)
    assert len(seen) == 2 and torch.equal(evaluate(segmenter, open_data(config.data).val).confusion, seen[-1])
