"""Speed, waiting and memory of training between two logged steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from flowseg.runs.memory import peak_process_memory, take_peak_memory
from flowseg.runs.parallel import Ranks


class SpeedWindow:
    """Counts of one window: the steps from one logged step to the next.

    The window ends when the host has read the loss of a logged step, and so has waited for all work of the window. Between
    two such reads the host may be many steps ahead of the device, so single steps cannot be timed by the host's clock.

    Args:
        ranks: the processes of the run.
        device: the device of this process.
    """

    def __init__(self, ranks: Ranks, device: torch.device):
        self.ranks, self.device = ranks, device
        self._restart(time.monotonic())

    def _restart(self, start: float) -> None:
        self._start = start
        self._images = self._flops = 0
        self._waited = 0.0

    def add(self, images: int, flops_per_image: int) -> None:
        """Count images of this process, with the model FLOPs of a training step for each."""
        self._images += images
        self._flops += images * flops_per_image

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def leave_out_since(self, begin: float) -> None:
        """Leave out the time since ``begin`` of ``time.monotonic``, at which the device must have had no step left to do."""
        self._start += time.monotonic() - begin

    def close(self) -> dict[str, float]:
        """End the window and start the next one. A collective.

        Returns:
            ``images_per_second`` of all processes; ``model_tflops_per_second`` per process; ``data_wait_share``, the share
            of the window in which the host waited for data, in the process that waited longest; ``memory_gib``, the most
            that tensors held on the device of a process since the last window; ``process_gib``, the most host memory that a
            process held since it started. Accelerators without such a count and CPUs have no ``memory_gib``, systems other
            than Linux no ``process_gib``.
        """
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        peak, process = take_peak_memory(self.device), peak_process_memory()
        images, flops = self._images * self.ranks.world, self._flops
        wait, *most = self.ranks.largest(min(self._waited / seconds, 1.0), peak or 0, process or 0)
        memory = {"memory_gib": peak, "process_gib": process}
        self._restart(now)
        return {
            "images_per_second": images / seconds,
            "model_tflops_per_second": flops / seconds / 1e12,
            "data_wait_share": wait,
            **{name: value / 2**30 for (name, own), value in zip(memory.items(), most) if own is not None},
        }
