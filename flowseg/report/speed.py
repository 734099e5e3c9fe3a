"""Compare kernels with eager PyTorch: first their results, then their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flowseg_kernels import (
    Codebook,
    available_backends,
    distance_correction,
    flow_loss,
    kronecker_centroids,
    nearest_centroid,
    use_backend,
)


def measure_kernels(
    size: int = 512, num_classes: int = 150, channels: int = 3, repeats: int = 5, device: torch.device | str = "cpu"
) -> list[dict]:
    """Time each operation with the default backend of this machine and with ``"reference"`` (eager PyTorch).

    Results are compared before anything is timed. Both sides are timed alternately: if the machine slows down, it slows
    both.

    Args:
        size: side of the image; the batch is one image.
        num_classes: number of classes.
        channels: number of code channels.
        repeats: number of timings per side; the result is their median.
        device: device to run on.

    Returns:
        One dictionary per operation: ``name``, ``backend``, ``ours_ms``, ``eager_ms``, ``max_error`` (largest difference
        relative to the largest value; for labels the share of pixels that differ). Operations without another backend
        than the reference are left out.

    Raises:
        AssertionError: a result differs from the reference.
    """
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(kronecker_centroids(num_classes, channels)).to(device)
    labels = torch.randint(0, num_classes, (1, size, size), generator=generator, dtype=torch.uint8).to(device)
    shape = (1, channels, size, size)
    noise = torch.randn(shape, generator=generator).to(device)
    source = torch.rand(shape, generator=generator).to(device) * 2 - 1
    estimate = codebook.encode(labels).to(noise.dtype) + 0.3 * noise
    t = torch.full((1,), 0.3, device=device)

    def loss_and_gradient() -> Tensor:
        leaf = estimate.detach().requires_grad_(True)
        flow_loss(leaf, source, labels, t, codebook, predicts="endpoint").backward()
        return leaf.grad

    cases: list[tuple[str, str, Callable[[], Tensor]]] = [
        ("distance_correction", "distance_correction", lambda: distance_correction(estimate, labels, codebook)),
        ("flow_loss, forward and backward", "flow_loss", loss_and_gradient),
        ("nearest_centroid", "nearest_centroid", lambda: nearest_centroid(estimate, codebook)),
    ]
    rows = []
    device_type = torch.device(device).type
    for name, op, run in cases:
        backend = available_backends(op, device_type)[0]
        if backend == "reference":
            continue
        ours = run()
        with use_backend("reference"):
            expected = run()
        error = _check(name, ours, expected, estimate, codebook)
        times: dict[str, list[float]] = {"ours": [], "eager": []}
        for _ in range(repeats):
            times["ours"].append(_time(run, device))
            with use_backend("reference"):
                times["eager"].append(_time(run, device))
        rows.append(
            {
                "name": name,
                "backend": backend,
                "ours_ms": 1e3 * statistics.median(times["ours"]),
                "eager_ms": 1e3 * statistics.median(times["eager"]),
                "max_error": error,
            }
        )
    return rows


def _check(name: str, ours: Tensor, expected: Tensor, x: Tensor, codebook: Codebook) -> float:
    if not expected.is_floating_point():
        different = ours != expected
        if different.any():
            # If two distances are equal up to rounding, either label is right.
            with use_backend("reference"):
                _, margin = nearest_centroid(x, codebook, return_margin=True)
            assert float(margin[different].max()) < 1e-5, f"{name}: labels differ from the reference"
        return float(different.double().mean())
    torch.testing.assert_close(
        ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=lambda m: f"{name}: {m}"
    )
    return float((ours - expected).abs().max() / expected.abs().max())


def _time(run: Callable[[], Tensor], device: torch.device | str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
