"""Copies from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``; the host does not wait for work that is queued there.

    A GPU copies without that wait only from pinned memory, so the tensor is pinned first.
    """
    if device.type != "cpu" and tensor.device.type == "cpu" and device.type != "mps":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
