"""Timing of one entry over rotating inputs, and the limits of this machine in this run.

On a CPU pytest-benchmark times the calls. On a GPU gpu_timing.py times them, and the entry's extra_info holds the times.
"""

import itertools
import time

import torch

from . import gpu_timing, machine
from .settings import BATCH, DEVICE, QUICK, SETS, SIZE, THROUGHPUT_ROUNDS, backend_of


def median_seconds(run, rounds=9):
    """Median time of run() on a CPU."""
    times = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times[2:])[rounds // 2]


def machine_limits():
    """Rates per second of this machine in this run.

    copy:       bytes copied, read and write counted
    multiply:   operations of the multiply units, two per fused multiply-add
    fp32, bf16: operations of matrix products
    """
    if DEVICE == "cuda":
        return gpu_timing.limits(QUICK)
    planes = [torch.rand(BATCH, 3, SIZE, SIZE) for _ in range(2 * SETS)]
    turn = itertools.cycle(range(SETS))

    def copy():
        i = next(turn)
        planes[SETS + i].copy_(planes[i])

    n = 128 if QUICK else 1024
    found = {"copy": 2 * 4 * planes[0].numel() / median_seconds(copy, 31)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
        found[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b)
    fma = machine.multiply_adds_per_second(torch.get_num_threads(), THROUGHPUT_ROUNDS)
    # Without a C++ compiler, use the rate of fp32 matrix products.
    found["multiply"] = 2 * fma if fma else found["fp32"]
    return found


def pairs_per_second(channels):
    """Pairs of a pixel and a class per second of the correction's arithmetic on all threads; None where it cannot be measured."""
    return machine.pairs_per_second(channels, torch.get_num_threads(), THROUGHPUT_ROUNDS) if DEVICE == "cpu" else None


def cpu_times(benchmark, call, inputs, rounds):
    """Let pytest-benchmark time call(inputs); return the peak memory in MiB, None where it cannot be measured."""
    if rounds != 1:
        call(next(inputs))
    begin = time.perf_counter()
    peak = machine.peak_mib(lambda: call(next(inputs)), DEVICE)
    once = max(time.perf_counter() - begin, 1e-6)
    rounds = 1 if QUICK else rounds or max(5, min(201, int(1.5 / once)))
    benchmark.extra_info["asked"] = rounds
    # Long calls need no further warm-up after the two calls above.
    warmup = 0 if QUICK or once > 0.3 else 3
    benchmark.pedantic(call, setup=lambda: ((next(inputs),), {}), rounds=rounds, warmup_rounds=warmup)
    return peak


def gpu_times(benchmark, entry, run, sets, graph):
    """Time run(inputs) by CUDA events into the entry's extra_info; return the peak memory in MiB."""
    with backend_of(entry):
        run(sets[0])
        peak = machine.peak_mib(lambda: run(sets[-1]), DEVICE)
        found = gpu_timing.call_times(run, sets, graph=graph and not entry.startswith(("KeOps", "faiss")))
        kernels = gpu_timing.kernel_times(run, sets[:2])
    benchmark.extra_info.update(found, kernels=kernels)
    benchmark.pedantic(lambda: None, rounds=1)
    return peak


def measure(
    benchmark,
    limits,
    run,
    workload,
    op,
    entry,
    *,
    rounds=None,
    spread=False,
    variant="",
    moved=0,
    operations=0,
    pairs=0,
    rate="multiply",
    graph=True,
    **info,
):
    """Time run(inputs) over rotating inputs and record the entry with its bound.

    The bound `limit_ms` is the longer of moving the bytes and computing, at the rates that this run measured.

    moved:      bytes that the op must read and write
    operations: operations of the multiply units, two per fused multiply-add
    rate:       the key of `limits` for the operations
    pairs:      pairs of a pixel and a class. On a CPU their arithmetic is measured directly before and after the entry, and
                replaces `operations`
    graph:      whether the entry may be timed in a CUDA graph
    """

    def in_backend(i):
        with backend_of(entry):
            return run(i)

    name = workload.name + (f" {variant}" if variant else "")
    benchmark.group = f"{op} {name}" + (f" spread {workload.spread:g}" if spread else "")
    benchmark.extra_info.update(
        op=op,
        workload=name,
        spread=workload.spread,
        entry=entry,
        pixels=getattr(workload, "pixels", SIZE * SIZE),
        **info,
    )
    rates = [pairs_per_second(workload.channels)] if pairs else []
    if DEVICE == "cuda":
        peak = gpu_times(benchmark, entry, run, workload.sets, graph)
    else:
        peak = cpu_times(benchmark, in_backend, workload.rotate(), rounds)
    if peak is not None:
        benchmark.extra_info["peak_mib"] = peak
    if moved or operations:
        rates += [pairs_per_second(workload.channels)] if pairs else []
        # The higher rate describes the machine; something else disturbed the lower one.
        computing = pairs / max(rates) if all(rates) and rates else operations / limits[rate]
        limit = max(moved / limits["copy"], computing)
        benchmark.extra_info.update(moved=moved, operations=operations, limit_ms=limit * 1e3)
