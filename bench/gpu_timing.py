"""Times of calls on a GPU by CUDA events, and times of single kernels by PyTorch's profiler.

A CUDA graph of many calls measures the kernels: launches cost nothing, and the start of the graph is divided by all calls.
Consecutive calls from Python measure eager PyTorch as a user sees it. The host time is the CPU time of Python and the launches.
"""

import itertools
import statistics
import time

import torch

#: Calls in one CUDA graph, and in one timed series of calls from Python (a "stretch").
CALLS = 50
#: Longest graph or stretch in seconds; long calls get shorter stretches.
STRETCH = 0.1
#: Stretches to take the median of.
STRETCHES = 9


def event_seconds(run, repeats):
    """Seconds of each of `repeats` calls of run(), by a pair of CUDA events per call."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def median_seconds(run, repeats=STRETCHES):
    """Median of event_seconds after two warm-up calls."""
    for _ in range(2):
        run()
    return statistics.median(event_seconds(run, repeats))


def captured(run, sets, calls):
    """A CUDA graph of `calls` calls of run(inputs) with rotating inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets:
            run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in itertools.islice(itertools.cycle(sets), calls):
            run(inputs)
    return graph


def _quartile_distance(times):
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def call_times(run, sets, *, graph=True, stretches=STRETCHES):
    """The timing fields of a row: milliseconds of one call of run(inputs), which must have been called before.

    ms:         median in a CUDA graph, or stream_ms without one; `clock` says which, and iqr_ms is the interquartile range
    stream_ms:  median of consecutive calls from Python, without synchronising in between
    host_ms:    median time until the call returns to Python, with an idle GPU and an empty launch queue
    """
    turn = itertools.cycle(sets)

    def stretch(calls):
        for _ in range(calls):
            run(next(turn))

    once = median_seconds(lambda: run(next(turn)), 3)
    stretches = min(stretches, 5) if once > 5 * STRETCH else stretches
    calls = max(1, min(CALLS, int(STRETCH / max(once, 1e-7))))
    calls = -(-calls // len(sets)) * len(sets) if calls >= len(sets) else calls
    stream = [seconds / calls for seconds in event_seconds(lambda: stretch(calls), stretches)]
    found = {"clock": "events", "rounds": stretches, "calls": calls, "stream_ms": statistics.median(stream) * 1e3}
    found["host_ms"] = host_milliseconds(run, turn, 1 if once > 0.02 else 15)
    times = stream
    if graph:
        try:
            replay = captured(run, sets, calls).replay
            median_seconds(replay, 1)
            times = [seconds / calls for seconds in event_seconds(replay, stretches)]
            found["clock"] = "graph"
        except Exception as error:  # some peers cannot be captured; keep their stream_ms
            torch.cuda.synchronize()
            found["no_graph"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return found | {"ms": statistics.median(times) * 1e3, "iqr_ms": _quartile_distance(times) * 1e3}


def host_milliseconds(run, turn, repeats):
    """Median time until run(inputs) returns to Python; the GPU is idle before each call."""
    times = []
    for _ in range(repeats):
        inputs = next(turn)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3


def kernel_times(run, sets, most=12):
    """{kernel: microseconds per call} of the longest kernels of run(inputs), by PyTorch's profiler; {} if profiling fails."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for inputs in sets:
                run(inputs)
            torch.cuda.synchronize()
        events = profile.key_averages()
    except Exception:  # the times above are worth more than the profile
        return {}
    times = {event.key[:80]: event.self_device_time_total / len(sets) for event in events}
    longest = sorted(times, key=times.get, reverse=True)[:most]
    return {name: round(times[name], 2) for name in longest if times[name] > 0}


def limits(quick=False):
    """Rates per second of this GPU: bytes copied (read and written), operations of fp32 fused multiply-adds, operations of fp32 and
    bf16 matrix products. `quick` only tests the code; its rates mean nothing."""
    found = {"copy": copy_rate(2**20 if quick else 2**29)}
    n = 256 if quick else 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        found[name] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, 5)
    found["multiply"] = multiply_rate(quick) or found["fp32"]
    return found


def copy_rate(count):
    """Bytes per second, reads and writes together, of a copy of `count` fp32 numbers."""
    source = torch.randn(count, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def multiply_rate(quick=False):
    """Operations per second, two per fused multiply-add, of a kernel that only multiplies and adds; None without Triton."""
    try:
        from .gpu_throughput import BLOCK, STEPS, multiply_kernel
    except ImportError:
        return None
    programs, rounds = torch.cuda.get_device_properties().multi_processor_count * 16, 1 if quick else 200
    out = torch.empty(programs * BLOCK.value, device="cuda")

    def run():
        multiply_kernel[(programs,)](out, 0.999, 1e-3, rounds, num_warps=4, enable_fp_fusion=True)

    return 2 * out.numel() * rounds * STEPS.value / median_seconds(run)
