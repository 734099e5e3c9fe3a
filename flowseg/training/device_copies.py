"""Copies of batches to the device, in a stream beside that of the computation."""

from __future__ import annotations

import torch
from torch import Tensor

from flowseg.data.loader import Batch


class DeviceCopies:
    """Copy batches to a device; a GPU gets them in a stream of their own.

    A host that is ahead starts the copy while the GPU still computes the step before. In a second stream the copy can run
    at once; in the stream of the computation it would wait for the end of that step. After a logged step the host is not
    ahead, as it has read the loss, and the copy overlaps nothing.

    Args:
        device: device that trains; without a GPU batches are not copied.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Start the copy of a batch. Later work of the current stream waits for it; the host does not."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            copied = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for part in copied:
            if isinstance(part, Tensor) and part.device.type == "cuda":
                # Otherwise the next copy could overwrite the memory before the current stream has read it.
                part.record_stream(current)
        return copied
