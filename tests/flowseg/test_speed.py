"""The numbers of a training log about speed, waiting and memory."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

import flowseg.runs.memory as memory
import flowseg.runs.speed as speed
import flowseg.training.trainer as training
from flowseg.model import count_flops
from flowseg.runs.parallel import Ranks
from flowseg.runs.progress import _facts, _joined
from flowseg.runs.speed import SpeedWindow
from flowseg.training.batches import StepBatches
from flowseg.training.trainer import train

from .support.processes import forked
from .support.runs import metrics
from .tiny import tiny_config

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still unless it is told otherwise."""

    now = 100.0

    def monotonic(self):
        return self.now


def spent(window):
    """The numbers of a window without the memory of this process."""
    numbers = window.close()
    numbers.pop("process_gib", None)
    return numbers


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(training, "time", clock)
    return clock


def test_a_window_divides_by_the_time_that_was_spent_training(clock):
    window = SpeedWindow(Ranks(1), CPU)
    with window.waiting():
        clock.now += 3
    window.add(8, 5 * 10**12)
    begin = clock.now
    clock.now += 100
    window.leave_out_since(begin)
    clock.now += 1
    window.add(8, 10**12)
    assert spent(window) == {"images_per_second": 4.0, "model_tflops_per_second": 12.0, "data_wait_share": 0.75}
    clock.now += 2
    window.add(4, 10**12)
    assert spent(window) == {"images_per_second": 2.0, "model_tflops_per_second": 2.0, "data_wait_share": 0.0}


def test_training_logs_speed_and_waiting_and_leaves_validation_and_checkpoints_out(clock, tmp_path, monkeypatch):
    """Each step waits one second for its batch and computes for three; validations and checkpoints take a thousand."""

    def takes(owner, name, seconds):
        original = getattr(owner, name)

        def slow(*arguments, **more):
            clock.now += seconds
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, slow)

    takes(StepBatches, "next_step", 1)
    takes(training, "flow_step", 3)
    takes(training, "evaluate", 1000)
    takes(training, "save_checkpoint", 1000)
    stages = [{"at": 4, "height": 32, "width": 16, "batch_size": 2}]
    shape = {"log_every": 2, "eval_every": 3, "checkpoint_every": 3, "stages": stages}
    config = tiny_config(train=shape)
    said = io.StringIO()
    train(config, tmp_path / "run", console=Console(file=said, width=200))
    assert "reads data 25 % of the time" in said.getvalue()
    lines = metrics(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["images_per_second"] for line in lines] == pytest.approx([1, 1, 0.5])
    small, large = (count_flops(config, height, 16).training / 1e12 for height in (16, 32))
    assert [line["model_tflops_per_second"] for line in lines] == pytest.approx([small, small, large / 2])
    assert [line["data_wait_share"] for line in lines] == pytest.approx([0.25] * 3)
    # The allocator of a CPU has no count.
    assert not any("memory_gib" in line for line in lines)


def test_memory_is_the_peak_since_the_line_before(monkeypatch):
    peaks, resets = iter([3 * 2**30, 2**30]), []
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", resets.append)
    device = torch.device("cuda", 0)
    window = SpeedWindow(Ranks(1), device)
    assert [window.close()["memory_gib"] for _ in range(2)] == [3.0, 1.0] and resets == [device] * 2


PEAKS = """
import numpy as np
from flowseg.runs.memory import peak_process_memory
before = peak_process_memory()
large = np.ones(2**24)
held = peak_process_memory()
del large
print(before, held, peak_process_memory())
"""


def test_the_memory_of_a_process_is_its_own_peak(monkeypatch):
    if memory.peak_process_memory() is None:
        pytest.skip("this system has no /proc/self/status")
    large = np.ones(2**26)
    found = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    before, held, after = map(int, found.split())
    assert before < large.nbytes, "a process does not inherit the peak of the one that started it"
    assert 0.9 * 2**27 < held - before < 1.2 * 2**27 and after > 0.9 * held
    monkeypatch.setattr(speed, "peak_process_memory", lambda: 3 * 2**29)
    assert SpeedWindow(Ranks(1), CPU).close()["process_gib"] == 1.5
    monkeypatch.setattr(speed, "peak_process_memory", lambda: None)
    assert "process_gib" not in SpeedWindow(Ranks(1), CPU).close()


def test_an_accelerator_without_a_count_of_memory_logs_none(monkeypatch):
    def refuse(device):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuse)
    assert memory.take_peak_memory(torch.device("mps")) is None
    assert "memory_gib" not in SpeedWindow(Ranks(1), torch.device("mps")).close()


def test_several_processes_log_the_sum_of_images_and_the_longest_wait():
    def both(rank):
        clock = Clock()
        speed.time = clock
        torch.distributed.init_process_group("gloo")
        window = SpeedWindow(Ranks(2, rank), CPU)
        window.add(6, 10**12)
        with window.waiting():
            clock.now += 1 + rank
        clock.now = 104.0
        found = spent(window)
        assert found == {"images_per_second": 3.0, "model_tflops_per_second": 1.5, "data_wait_share": 0.5}, found

    assert forked(both, world=2) == [0, 0]


def test_the_progress_line_says_when_training_waits_for_data():
    facts = _facts({"loss": 0.25, "speed": 12.34, "wait": 0.354, "memory": 19.53, "miou": None})
    assert _joined(facts) == "loss 0.2500  12.3 img/s  19.5 GiB  waits for data 35 %"
    assert _joined(_facts({"wait": 0.354, "workers": 0, "miou": 12.34})) == "mIoU 12.3 %  reads data 35 % of the time"
    assert _joined(_facts({"wait": 0.354, "workers": 2})) == "waits for data 35 %"
    # A later line with a short wait takes the warning back.
    assert _joined(facts | _facts({"wait": 0.05})) == "loss 0.2500  12.3 img/s  19.5 GiB"
