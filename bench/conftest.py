"""Workloads and the timing of one entry: inputs rotate so that no cache answers, correctness is asserted first."""

import itertools
import os
import platform
import time

import pytest
import torch

import flowseg_kernels as fk

#: name: (classes, factor on the spread of points around their codes)
WORKLOADS = {"ade512": (150, 1.0), "coco512": (171, 1.0), "many": (1000, 0.5)}
SIZE = int(os.environ.get("FLOWSEG_BENCH_SIZE", "512"))
SETS = 4


class Workload:
    """Rotating inputs of one workload: x near its codes, source, labels, times."""

    def __init__(self, name: str, spread: float):
        classes, factor = WORKLOADS[name]
        # What is reported is the standard deviation that the points really have.
        self.name, self.spread = name, spread * factor
        generator = torch.Generator().manual_seed(0)
        self.codebook = fk.Codebook(fk.kronecker_centroids(classes, 3), ignore_index=-1)
        self.sets = []
        for _ in range(SETS):
            classes_of = torch.randint(0, classes, (1, SIZE, SIZE), generator=generator)
            noise = torch.randn(1, 3, SIZE, SIZE, generator=generator)
            self.sets.append(
                {
                    "x": self.codebook.encode(classes_of) + self.spread * noise,
                    "source": torch.rand(1, 3, SIZE, SIZE, generator=generator) * 2 - 1,
                    "labels": classes_of.to(torch.uint8) if classes <= 256 else classes_of.to(torch.int16),
                    "t": torch.rand(1, generator=generator),
                }
            )

    def rotate(self):
        return itertools.cycle(self.sets)


@pytest.fixture(scope="session")
def workloads():
    """workloads(name, spread): a Workload, made once."""
    made = {}

    def get(name, spread=0.3):
        if (name, spread) not in made:
            made[name, spread] = Workload(name, spread)
        return made[name, spread]

    return get


@pytest.fixture
def measure(benchmark):
    """measure(run, workload, group, entry, pixels): times run(inputs) over rotating inputs and records what it was."""

    def call(run, workload, op, entry, *, rounds=None, spread=False):
        inputs = workload.rotate()
        run(next(inputs))
        begin = time.perf_counter()
        run(next(inputs))
        rounds = rounds or max(3, min(41, int(2.0 / max(time.perf_counter() - begin, 1e-6))))
        benchmark.group = f"{op} {workload.name}" + (f" spread {workload.spread:g}" if spread else "")
        benchmark.extra_info.update(
            op=op, workload=workload.name, spread=workload.spread, entry=entry, pixels=SIZE * SIZE
        )
        benchmark.pedantic(run, setup=lambda: ((next(inputs),), {}), rounds=rounds, warmup_rounds=3)

    return call


def pytest_benchmark_update_machine_info(config, machine_info):
    facts = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    model = next((line.split(":")[1].strip() for line in facts.splitlines() if line.startswith("model name")), "")
    info = {"model": model or platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    machine_info.clear()
    machine_info.update(
        info, flowseg_kernels=fk.__version__, python=platform.python_version(), system=platform.system()
    )
    if fk.available_backends("flow_loss")[0] == "cpu":
        machine_info["instruction_set"] = ("baseline", "avx2", "avx512")[torch.ops.flowseg_cpu.instruction_set()]


def peer(module):
    """The module of a peer, or a skip that says it is not installed."""
    return pytest.importorskip(module, reason=f"{module} is not installed; `make bench` installs it")
