"""Fixtures of `pytest bench/`, and the facts about machine and commit that each result file holds."""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import pytest
import torch

import flowseg_kernels as fk
from flowseg.runs.machine import cpu_model

from . import measure as measuring
from .cases.workloads import named_workload
from .settings import DEVICE


@pytest.fixture(scope="session")
def workloads():
    """workloads(name, spread): a Workload, made once."""
    made = {}

    def get(name, spread=0.3):
        if (name, spread) not in made:
            if DEVICE == "cuda":
                made.clear()  # one workload takes several GB, including its label maps in the peers' formats
            made[name, spread] = named_workload(name, spread)
        return made[name, spread]

    return get


@pytest.fixture(scope="session")
def limits():
    """The limits of this machine, measured once per run."""
    return measuring.machine_limits()


@pytest.fixture
def measure(benchmark, limits):
    """measure(run, workload, op, entry): time run(inputs) and record the entry; see bench.measure.measure."""
    return functools.partial(measuring.measure, benchmark, limits)


def gpu_tools():
    """Versions of the driver, of Triton, and of the nvcc that compiled our library."""
    found = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    facts = pathlib.Path(fk.__file__).parent / "lib" / "libflowseg_cuda.json"
    if facts.exists():
        found["nvcc"] = json.loads(facts.read_text())["compiler"]
    return found


def pytest_benchmark_generate_machine_info(config):
    """Replaces pytest-benchmark's facts, whose collection takes a second."""
    model = cpu_model() or platform.processor()
    info = {"model": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if DEVICE == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **gpu_tools()}
    info |= {"flowseg_kernels": fk.__version__, "python": platform.python_version(), "system": platform.system()}
    if DEVICE == "cpu" and fk.available_backends("flow_loss")[0] == "cpu":
        info["instruction_set"] = ("baseline", "avx2", "avx512")[torch.ops.flowseg_cpu.instruction_set()]
    return info


def pytest_benchmark_update_commit_info(config, commit_info):
    """Set "dirty" if sources differ from the commit; files that a benchmark run writes or renders do not count.

    FLOWSEG_BENCH_COMMIT names the commit of a copy without git, with "-dirty" appended if its sources differ.
    """
    given = os.environ.get("FLOWSEG_BENCH_COMMIT")
    if given:
        commit_info.update(id=given.removesuffix("-dirty"), dirty=given.endswith("-dirty"))
        return
    written = ("bench/results", "README.md", "docs/images", "docs/results")
    query = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in written)]
    commit_info["dirty"] = True
    with contextlib.suppress(OSError):  # without git the state is unknown and stays dirty
        asked = subprocess.run(query, cwd=config.rootpath, capture_output=True, text=True)
        commit_info["dirty"] = asked.returncode != 0 or bool(asked.stdout.strip())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Drop the entry that an interrupt left without times: pytest-benchmark could not write the other entries otherwise."""
    kept = getattr(session.config, "_benchmarksession", None)
    if kept:
        kept.benchmarks[:] = [entry for entry in kept.benchmarks if entry.stats.data]
