"""Counts of pairs of a true and a predicted class, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

# Number of pixels to count at a time: the cells of a chunk fit into the cache of a CPU.
_CHUNK = 2**18


class PairCounts:
    """Count pairs of labels without reading the device before the end.

    Neighbouring pixels mostly count in the same cell, and such additions wait for each other. So there are several copies of
    the matrix, and neighbours count in different copies.

    Args:
        classes: number of classes. Other values count together: as ignored in the truth, as undecided in predictions.
        device: device of the labels.
    """

    def __init__(self, classes: int, device: torch.device):
        self.side = classes + 1
        cells, on_cpu = self.side**2, self._on_cpu(device)
        copies = min(8, max(1, 2**15 // cells)) if on_cpu else 16
        # bincount on a CPU is fastest for short integers; scatter_add_ needs long ones.
        dtype = torch.int64 if not on_cpu else torch.int16 if copies * cells <= 2**15 else torch.int32
        self._counts = torch.zeros(copies * cells, dtype=torch.int64, device=device)
        self._first = torch.arange(_CHUNK, device=device).remainder_(copies).mul_(cells).to(dtype)
        self._ones = torch.ones(0 if on_cpu else _CHUNK, dtype=torch.int64, device=device)

    @staticmethod
    def _on_cpu(device: torch.device) -> bool:
        return device.type == "cpu"

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Count the pixels of two label maps ``(H, W)`` uint8."""
        others = self.side - 1
        for true, found in zip(truth.flatten().split(_CHUNK), predicted.flatten().split(_CHUNK)):
            cells = true.clamp(max=others).to(self._first.dtype).mul_(self.side).add_(found.clamp(max=others))
            cells += self._first[: len(cells)]
            if self._on_cpu(cells.device):
                self._counts += torch.bincount(cells, minlength=len(self._counts))
            else:
                # bincount would read the largest value back to choose the number of bins.
                self._counts.scatter_add_(0, cells, self._ones[: len(cells)])

    def confusion(self) -> tuple[Tensor, Tensor]:
        """The counts ``(K, K)`` [truth, prediction], and the number of pixels ``(K,)`` of each true class, on the CPU."""
        counts = self._counts.view(-1, self.side, self.side).sum(0)[:-1].cpu()
        return counts[:, :-1].contiguous(), counts.sum(1)
