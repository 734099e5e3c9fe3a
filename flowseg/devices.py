"""Copies from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def host_may_go_on(device: torch.device) -> bool:
    """Whether the host may go on before a copy from its memory to ``device`` has ended.

    An Apple GPU would read the memory later, when the host may have freed it or written to it.
    """
    return device.type != "mps"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``. The host does not wait for work that is queued there, except on an Apple GPU.

    A GPU copies without that wait only from pinned memory, so the tensor is pinned first.
    """
    from_host = tensor.device.type == "cpu"
    # Tensors of the compiler (fake, functional) have no memory to pin.
    if from_host and type(tensor) is Tensor and device.type not in ("cpu", "mps", "meta"):
        tensor = tensor.pin_memory()
    # A copy to the host must have ended before the host reads it.
    return tensor.to(device, non_blocking=from_host and host_may_go_on(device))
