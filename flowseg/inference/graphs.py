"""CUDA graphs of a function of tensors: the host starts one graph instead of each of its kernels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from flowseg_kernels import requested_backend

Replay = Callable[[], None]


class Graphs:
    """Recorded calls of functions, by a key and the shapes of the inputs.

    The first call with a key computes as always, so that a size that never returns costs nothing. The second records.
    A new graph replaces the one that was not used for the longest time if there are :attr:`MOST`.
    """

    MOST = 8
    # Number of keys that were called once, before they are forgotten.
    _MOST_KEYS = 256

    def __init__(self):
        self._recorded: OrderedDict[Hashable, tuple[list[Tensor], Replay, Tensor]] = OrderedDict()
        self._called: set[Hashable] = set()
        self._owner: Hashable = None
        # Inputs and outputs have fixed memory, which two threads must not use at the same time.
        self._lock = threading.Lock()

    def __reduce__(self):
        # A graph belongs to the memory of this process.
        return Graphs, ()

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._recorded.clear()
        self._called.clear()

    def run(self, owner: Hashable, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, replayed if it was recorded.

        Args:
            owner: what the graphs belong to; another owner forgets them all.
            key: everything that the function's result depends on, apart from the inputs, the requested backend of the kernels and
                the values of tensors whose memory stays.
            function: launches kernels only; it reads nothing back and draws no random numbers.
            inputs: tensors on one GPU.
        """
        # Replays in two streams would overwrite each other's inputs, so each stream has a graph of its own.
        stream = _current_stream(inputs[0].device)
        key = key, requested_backend(), stream, *((tuple(one.shape), one.dtype) for one in inputs)
        with self._lock:
            if owner != self._owner:
                self._forget()
                self._owner = owner
            if key not in self._recorded:
                if key not in self._called:
                    if len(self._called) >= self._MOST_KEYS:
                        self._called.clear()
                    self._called.add(key)
                    return function(*inputs)
                while len(self._recorded) >= self.MOST:
                    self._recorded.popitem(last=False)
                # A noise source is one expanded example: the graph needs memory for all.
                with torch.inference_mode(False):
                    fixed = [one.clone(memory_format=torch.contiguous_format) for one in inputs]
                self._recorded[key] = (fixed, *record(function, fixed))
            self._recorded.move_to_end(key)
            fixed, replay, output = self._recorded[key]
            torch._foreach_copy_(fixed, list(inputs))
            replay()
            # The next replay overwrites the output.
            return output.clone()


def _current_stream(device: torch.device) -> Hashable:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def record(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Replay, Tensor]:
    """Record ``function(*inputs)`` as a CUDA graph. Return what replays it, and the output, which each replay overwrites."""
    with torch.cuda.device(inputs[0].device):
        # Tables, workspaces and compiled kernels are made outside of the graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin batches of the training, may call CUDA while this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = function(*inputs)

    def replay() -> None:
        with torch.cuda.device(output.device):
            graph.replay()

    return replay, output
