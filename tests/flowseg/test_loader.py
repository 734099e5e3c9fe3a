"""The way of a training example to the device: what is drawn where, how it travels, and the processes that load it."""

import contextlib
import io
import itertools
import multiprocessing
import runpy
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

import flowseg.data.workers as workers
import flowseg.runs.machine as machine
import flowseg.training.batches as batches
import flowseg.training.device_copies as device_copies
import flowseg.training.trainer as training
from flowseg.build import build
from flowseg.config import load_config, save_config
from flowseg.data import open_data, training_batches
from flowseg.data.draws import example_generator
from flowseg.data.loader import Batch, example_batches
from flowseg.data.transforms import augment, normalised, to_tensor
from flowseg.data.workers import lost_worker, start_method, worker_count
from flowseg.devices import to_device
from flowseg.errors import UserError
from flowseg.flow import make_source, sample_times
from flowseg.runs.parallel import Ranks
from flowseg.training.device_copies import DeviceCopies
from flowseg.training.objective import flow_step
from flowseg.training.trainer import train
from flowseg_kernels import flow_interpolate, flow_loss

from .support.processes import forked
from .support.runs import assert_same_weights, metrics
from .tiny import folder_section, tiny_config


def batch_of(config, count=0):
    """The batch number ``count`` of a run."""
    stream = example_batches(open_data(config.data).train, config, workers=0)
    return [next(stream) for _ in range(count + 1)][-1]


SETTINGS = {
    "image": {},
    "padded_image": {"codes": {"channels": 5}, "flow": {"zero_fraction": 0.0}},
    "noise": {"codes": {"channels": 5}, "flow": {"source": "noise", "time_sampler": "logit_normal", "time_shift": 2.0}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_batch_gives_bit_for_bit_the_loss_of_its_examples_one_by_one(case):
    """The reference draws each example's time, then its noise, and makes its image float before it stacks the batch."""
    augmentation = {"flip": True, "scale_max": 2.0, "color_jitter": 0.3}
    config = tiny_config(data=augmentation, train={"seed": 3}, **SETTINGS[case])
    pairs, flow = open_data(config.data).train, config.flow
    model, codebook = build(config, 11)
    with torch.no_grad():
        for parameter in model.parameters():
            # A new network has layers of zeros, behind which every gradient is zero.
            parameter.normal_(std=0.1)
    order = np.random.default_rng((3, 0, 0)).permutation(len(pairs))

    times, sources, images, labels = [], [], [], []
    for draw in range(4, 8):
        pixels, target = augment(*pairs[int(order[draw])], config.data, np.random.default_rng((3, 1, draw)))
        generator = example_generator(3, draw)
        options = {"sampler": flow.time_sampler, "shift": flow.time_shift, "zero_fraction": flow.zero_fraction}
        times.append(sample_times(1, generator=generator, **options))
        images.append(pixels.float().div_(127.5).sub_(1.0))
        sources.append(make_source(images[-1][None], config.codes.channels, flow.source, generator))
        labels.append(target)
    images, labels, source, t = torch.stack(images), torch.stack(labels), torch.cat(sources), torch.cat(times)
    prediction = model(flow_interpolate(source, labels, t, codebook), t, images)
    loss = flow_loss(prediction, source, labels, t, codebook, predicts="endpoint", reduction="sum")
    wanted = loss, torch.autograd.grad(loss, model.patch_embed.proj.weight)[0]

    batch = batch_of(config, 1)
    assert batch.images.dtype == torch.uint8 and batch.draws.tolist() == [4, 5, 6, 7]
    assert (batch.noise is None) == (case != "noise") and batch.labelled == int((labels != 255).sum())
    step = flow_step(model, codebook, config, batch)
    found = step.flow, torch.autograd.grad(step.flow, model.patch_embed.proj.weight)[0]
    assert torch.equal(step.source, source) and torch.equal(step.t, t) and torch.equal(step.labels, labels)
    for ours, reference in zip(found, wanted):
        assert torch.equal(ours, reference) and ours.abs().max() > 0


def test_labelled_pixels_leave_out_ignored_ones(folder_data):
    config = tiny_config(data=folder_section(folder_data, scale_min=0.4, scale_max=0.6))
    batch = batch_of(config)
    assert 0 < batch.labelled == int((batch.labels != 255).sum()) < batch.labels.numel() / 2


def test_bytes_become_the_floats_of_inference():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], -1))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wanted = (pixels.double() / 127.5 - 1).float()
    assert torch.equal(normalised(pixels), to_tensor(image))
    torch.testing.assert_close(to_tensor(image), wanted, rtol=0, atol=1e-7)
    assert to_tensor(image).min() == -1 and to_tensor(image).max() == 1


def test_public_batches_are_the_same_examples_as_floats():
    config = tiny_config(data={"flip": True, "scale_max": 2.0}, train={"seed": 7})
    images, labels, draws = next(training_batches(open_data(config.data).train, config.data, 4, seed=7))
    batch = batch_of(config)
    assert torch.equal(images, normalised(batch.images)) and images.dtype == torch.float32
    assert torch.equal(labels, batch.labels) and torch.equal(draws, batch.draws)


@pytest.mark.parametrize("source", ["image", "noise"])
def test_workers_give_the_batches_of_the_process_itself(source):
    config = tiny_config(flow={"source": source}, data={"scale_max": 2.0, "color_jitter": 0.2})
    pairs = open_data(config.data).train
    streams = [example_batches(pairs, config, workers=count) for count in (0, 2)]
    for own, helped in itertools.islice(zip(*streams), 3):
        for ours, theirs in zip(own, helped):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_a_run_resumes_bit_for_bit_with_other_workers_in_a_later_stage(tmp_path):
    def settings(steps, count):
        stages = [{"at": 2, "height": 24, "width": 32, "batch_size": 1}]
        shape = {"batch_size": 2, "accumulation": 2, "stages": stages, "eval_every": 100, "eval_images": 1}
        tree = {"train": shape | {"steps": steps}, "optim": {"schedule": "constant"}, "data": {"workers": count}}
        return tiny_config(flow={"source": "noise"}, **tree)

    train(settings(5, 0), tmp_path / "whole")
    train(settings(1, 2), tmp_path / "part")
    for steps, count in ((3, 1), (5, 2)):
        state = train(settings(steps, count), tmp_path / "part", resume=True).state
    assert state.draws == 2 * 4 + 3 * 2
    assert_same_weights(tmp_path / "part", tmp_path / "whole")
    losses = [[line["loss"] for line in metrics(tmp_path / name, "train")] for name in ("part", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 5


# ---- Copies to the device ----


def test_pinning_keeps_a_batch_as_it_is(monkeypatch):
    """The pinning thread of torch's loader takes a batch apart and builds it again."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: (pinned.append(self), self.clone())[1])
    batch = batch_of(tiny_config())
    copy = pin_memory(batch)
    assert type(copy) is Batch and copy.noise is None and copy.labelled == batch.labelled
    assert [id(part) for part in pinned] == [id(part) for part in batch[:3] + batch[4:5]]


def test_the_cpu_computes_on_the_loaders_own_memory():
    batch = batch_of(tiny_config(flow={"source": "noise"}))
    copied = DeviceCopies(torch.device("cpu"))(batch)
    assert all(ours is theirs for ours, theirs in zip(copied, batch))


def test_a_gpu_gets_batches_in_a_second_stream(monkeypatch):
    """A pretend GPU notes the order: the copy in the second stream, then the wait of the first, before the batch is given."""
    events, current = [], ["main"]

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Part(torch.Tensor):
        device = torch.device("cuda")

        def to(self, device, non_blocking=False):
            events.append(f"copy in {current[-1]}" + (" blocks" if not non_blocking else ""))
            return self

        def record_stream(self, stream):
            events.append(f"kept for {stream.name}")

    @contextlib.contextmanager
    def inside(stream):
        current.append(stream.name)
        yield
        current.pop()

    made = []
    fake = types.SimpleNamespace(
        Stream=lambda device: made.append(device) or Stream(),
        stream=inside,
        current_stream=lambda device: Stream(current[-1]),
    )
    monkeypatch.setattr(device_copies, "torch", types.SimpleNamespace(cuda=fake))
    copies = DeviceCopies(torch.device("cuda"))
    batch = Batch(*(torch.zeros(1).as_subclass(Part) for _ in range(4)), torch.arange(1), 1)
    for given in (batch, batch._replace(noise=None)):
        events.clear()
        moved = copies(given)
        count = sum(part is not None for part in given[:4])
        assert events == ["copy in copies"] * count + ["main waits for copies"] + ["kept for main"] * count
        assert moved.draws is given.draws and moved.labelled == 1
    assert len(made) == 1, "a stream for each copy keeps memory for each stream"


@pytest.mark.parametrize(("target", "non_blocking"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_an_apple_gpu_copies_before_the_host_may_free_the_memory(target, non_blocking, monkeypatch):
    calls, pinned = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(self), self)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: (calls.append(options), self)[1])
    batch_of(tiny_config(flow={"source": "noise"})).to(torch.device(target))
    assert calls == [{"non_blocking": non_blocking}] * 4 and not pinned
    to_device(torch.zeros(2), torch.device(target))
    assert calls[4:] == [{"non_blocking": non_blocking}] and len(pinned) == non_blocking
    # The host reads a copy from a device at once.
    to_device(torch.zeros(2, device="meta"), torch.device("cpu"))
    assert calls[5:] == [{"non_blocking": False}] and len(pinned) == non_blocking


def test_tensors_without_memory_are_not_pinned(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("a tensor without memory was pinned")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert make_source(torch.empty(1, 3, 8, 8, device="meta"), 3, "noise").device.type == "meta"
    with FakeTensorMode():
        noise = make_source(torch.empty(1, 3, 8, 8, device="cuda"), 3, "noise")
    assert noise.device.type == "cuda" and noise.shape == (1, 3, 8, 8)


class Divisors(TorchDispatchMode):
    """Collects what float32 tensors are divided by."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div_.Tensor:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


def test_images_are_divided_by_a_number_in_the_memory_of_their_device():
    """CUDA multiplies by the reciprocal of a number that the host keeps, which rounds otherwise."""
    with Divisors() as divisors:
        normalised(torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta"))
    (divisor,) = divisors.found
    assert isinstance(divisor, torch.Tensor) and divisor.device.type == "meta" and divisor.dtype == torch.float32
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(normalised(values), values.float() / 127.5 - 1)


# ---- Worker processes ----


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A GPU, sixteen cores and a large /dev/shm, for the rule that counts workers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "usable_cores", lambda: 16)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**40))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return monkeypatch


def test_the_automatic_number_of_workers_follows_the_cores_of_each_process(pretend_gpu):
    config = tiny_config()
    assert config.data.workers is None and worker_count(config) == 8
    for cores, processes, wanted in ((16, 4, 4), (16, 8, 2), (4, 8, 1), (3, 1, 3), (64, 1, 8), (64, 8, 8)):
        pretend_gpu.setattr(machine, "usable_cores", lambda cores=cores: cores)
        pretend_gpu.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert worker_count(config) == wanted, (cores, processes)
    # A caller with their own pairs gives no classes.
    assert worker_count(tiny_config(data={"name": "folder"})) == 8
    for given in (0, 3, 20):
        assert worker_count(tiny_config(data={"workers": given})) == given


def test_automatic_workers_do_not_fill_the_shared_memory(pretend_gpu):
    """Each worker has two batches under way. A pixel takes 4 bytes, and 4 for each channel of noise."""
    free = types.SimpleNamespace(free=64 * 2**20)
    pretend_gpu.setattr(workers.shutil, "disk_usage", lambda path: free)
    shape = {"data": {"height": 512, "width": 512}, "train": {"batch_size": 4}}
    assert worker_count(tiny_config(**shape)) == 8
    shape["train"] = {"batch_size": 16}
    assert worker_count(tiny_config(**shape)) == 2
    assert worker_count(tiny_config(flow={"source": "noise"}, codes={"channels": 8}, **shape)) == 0
    pretend_gpu.setenv("LOCAL_WORLD_SIZE", "2")
    assert worker_count(tiny_config(**shape)) == 1


def test_no_automatic_workers_without_a_gpu_or_in_a_daemon(pretend_gpu):
    pretend_gpu.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert worker_count(tiny_config()) == 0
    pretend_gpu.undo()
    if not torch.cuda.is_available():
        assert worker_count(tiny_config()) == 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_usable_cores_follow_affinity_and_the_quota_of_a_container(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.usable_cores() == cores


def test_the_log_tells_the_automatic_number_once_per_change(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "worker_count", lambda stage: 1 if stage.data.height == 16 else 0)
    stages = [{"at": 2, "height": 16, "width": 24}, {"at": 3, "height": 24, "width": 24}]
    config, output = tiny_config(train={"steps": 4, "stages": stages, "eval_images": 1}), io.StringIO()
    train(config, tmp_path / "run", console=Console(file=output))
    lines = [line for line in output.getvalue().splitlines() if "workers" in line]
    assert lines == ["data.workers: 1 per process (automatic)", "data.workers: 0 per process (automatic)"]
    assert load_config(tmp_path / "run" / "config.yaml").data.workers is None
    output.truncate(0)
    monkeypatch.undo()
    config.data.workers = 0
    train(config, tmp_path / "given", console=Console(file=output))
    assert "workers" not in output.getvalue()


def test_the_workers_of_a_stage_end_before_those_of_the_next_are_counted(monkeypatch):
    def count(stage):
        running.append(set(multiprocessing.active_children()) - others)
        return 1

    monkeypatch.setattr(batches, "worker_count", count)
    others, running = set(multiprocessing.active_children()), []
    config = tiny_config(train={"stages": [{"at": 1, "height": 16, "width": 24}]})
    steps = batches.StepBatches(open_data(config.data).train, Ranks(1))
    for step in range(2):
        steps.next_step(config.at_step(step), step * config.train.batch_size)
    assert set(multiprocessing.active_children()) - others
    # Their batches would count as shared memory that is taken.
    assert running == [set(), set()]


def test_settings_of_earlier_runs_keep_their_number_of_workers(tmp_path):
    for given in (0, 8):
        save_config(tiny_config(data={"workers": given}), tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml").data.workers == given
    with pytest.raises(UserError, match=r"data\.workers"):
        load_config(None, ["data.workers=-1"])


def test_a_lost_worker_is_named_with_what_to_do(monkeypatch):
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...\nTraceback")
    config = tiny_config().data
    text = str(lost_worker(died, 8, config))
    assert "Bus error" in text and "fewer than 8 workers, the automatic number, or smaller images" in text
    assert "\n" not in text and "__main__" not in text
    config.workers = 3
    assert "fewer than 3 workers or" in str(lost_worker(EOFError(), 3, config))
    assert "could not start" in str(lost_worker(OSError(12, "Cannot allocate memory"), 3, config))
    for start in ("spawn", "forkserver"):
        monkeypatch.setattr(workers, "start_method", lambda start=start: start)
        text = str(lost_worker(died, 3, config))
        assert f"start by {start}" in text and "__main__" in text
    # Errors that a worker has caught and sent are no deaths.
    for error in (RuntimeError, ConnectionError, OSError):
        assert lost_worker(error("Caught RuntimeError in DataLoader worker process 0.\n..."), 3, config) is None
    assert lost_worker(FileNotFoundError(2, "No such file"), 3, config) is None


def test_a_bug_in_a_worker_keeps_its_traceback(folder_data):
    class Broken(list):
        def __getitem__(self, index):
            raise RuntimeError("a bug")

    config = tiny_config(data=folder_section(folder_data))
    with pytest.raises(RuntimeError, match="a bug"):
        next(example_batches(Broken([0, 1]), config, workers=1))


def test_workers_start_by_fork_unless_the_program_chose_otherwise(monkeypatch):
    context = multiprocessing.get_context()
    for chosen, default, wanted in (
        (None, "fork", "fork"),
        ("fork", "fork", "fork"),
        ("spawn", "fork", "spawn"),
        ("forkserver", "fork", "forkserver"),
        (None, "forkserver", "fork"),
        ("forkserver", "forkserver", "fork"),
        ("spawn", "forkserver", "spawn"),
    ):
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda default=default: [default, "other"])
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False, chosen=chosen: chosen)
        assert start_method() == (wanted if sys.platform == "linux" else chosen or default)
    assert context is multiprocessing.get_context()


SCRIPT = """
import multiprocessing, pathlib
# The default of Python 3.14 on Linux.
methods = multiprocessing.context._default_context
methods._actual_context, methods._default_context = None, multiprocessing.get_context("forkserver")
multiprocessing.get_all_start_methods = lambda: ["forkserver", "fork", "spawn"]
assert multiprocessing.Queue() and multiprocessing.get_start_method() == "forkserver"
from flowseg.training.trainer import train
from tests.flowseg.tiny import tiny_config

place = pathlib.Path(__file__).parent
with (place / "started").open("a") as file:
    file.write("once ")
assert train(tiny_config(data={"workers": 1}, train={"steps": 2, "eval_images": 1}), place / "run").state.step == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers start as Python's default says")
def test_a_script_without_a_main_guard_trains_with_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert forked(lambda rank: runpy.run_path(str(script), run_name="__main__")) == [0]
    assert (tmp_path / "started").read_text() == "once " and len(metrics(tmp_path / "run", "train")) == 2


def test_only_the_loaders_process_draws_times_and_noise(tmp_path, monkeypatch):
    def validation(*args, **others):
        raise UserError("enough")

    # A validation draws noise of its own in the training process.
    monkeypatch.setattr(training, "evaluate", validation)
    made, original = [], torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *args: made.append(args) or original(*args))
    config = tiny_config(flow={"source": "noise"}, train={"steps": 2}, data={"workers": 1})
    with pytest.raises(UserError, match="enough"):
        train(config, tmp_path / "run")
    assert len(metrics(tmp_path / "run", "train")) == 2 and len(made) <= 1
