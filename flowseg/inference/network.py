"""The network as sampling runs it: with weights that are cast to bf16 once instead of at each evaluation, and compiled."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from flowseg.errors import CompilerWarning
from flowseg.model import FlowSegModel
from flowseg.model.compiling import missing_compiler

# Layers whose weights and biases autocast casts at each call. Norms compute with float32 weights under autocast.
_CAST_LAYERS = (nn.Linear, nn.Conv2d)
_KNOWN_PACKAGES = ("torch", "flowseg", "flowseg_kernels")


_numbers = itertools.count(1)


class SamplingNetwork:
    """Stands for a network that is sampled under bf16 autocast: the same outputs, bit for bit, with fewer casts.

    Autocast keeps the casts of weights only if they require gradients, which averaged weights do not. So this class keeps a
    copy of the network whose linear and convolutional layers have bf16 weights; it shares every other tensor.

    The copy follows the network: each call of :meth:`of` casts the weights into the memory of the copy again, because PyTorch
    does not count every write. The copy is made again if a module or a tensor was replaced. A new value of an attribute that
    is no tensor is not seen, and needs :meth:`refresh`.

    A network that is more than its weights runs itself: with hooks, with modules of other packages such as adapters, or of
    another class.
    """

    def __init__(self):
        self._modules: list[nn.Module] = []
        self._tensors: list[Tensor] = []
        self._copy: nn.Module | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._compiled: tuple[nn.Module, Callable] | None = None
        self._lock = threading.Lock()
        self.structure = 0

    def __reduce__(self):
        # Copies and pickles of a segmenter make their own copy of the network.
        return SamplingNetwork, ()

    def refresh(self) -> None:
        """Make the copy again at the next call."""
        self._modules = []

    def of(self, model: nn.Module, *, cast: bool) -> nn.Module:
        """The module to call: ``model``, or with ``cast`` its copy.

        Afterwards :attr:`structure` is 0 if the network must run itself, else a number that changes if a module or the memory
        of a tensor was replaced.
        """
        found = _modules_and_tensors(model)
        # Tensors made in inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._followed(model, found, cast)

    def _followed(self, model: nn.Module, found: tuple[list[nn.Module], list[Tensor]] | None, cast: bool) -> nn.Module:
        if found is None:
            self._modules, self._tensors, self._copy, self._compiled, self.structure = [], [], None, None, 0
            return model
        modules, tensors = found
        if not _same(modules, self._modules) or not _same_memory(tensors, self._tensors):
            self._modules, self._copy, self._compiled = modules, None, None
            # Aliases keep the memory, so that its address cannot come back with another tensor.
            self._tensors = [tensor.detach() for tensor in tensors]
            self.structure = next(_numbers)
        if not cast:
            self._copy = None
            return model
        if self._copy is None:
            self._copy, self._pairs = _cast_copy(model)
            self.structure = next(_numbers)
        else:
            torch._foreach_copy_(self._pairs[1], self._pairs[0])
        return self._copy

    def compiled(self, network: nn.Module, images: Tensor) -> Callable:
        """``torch.compile`` of a module that :meth:`of` returned, for images ``(B, 3, H, W)``."""
        if self._compiled is None or self._compiled[0] is not network:
            self._compiled = network, _CompiledOrNot(network, compiled(network))
        network.prepare(*images.shape[-2:], images.device)
        return self._compiled[1]


def compiled(network: nn.Module) -> Callable:
    """Compile a network for sampling.

    The first number of images compiles, and the second once more for all numbers above one. A single image compiles by itself.
    """
    return torch.compile(network)


class _CompiledOrNot:
    """A compiled network, or after a warning the network itself where there is no compiler."""

    def __init__(self, network: nn.Module, compiled: Callable):
        self._network, self._call = network, compiled

    def __call__(self, *inputs):
        try:
            return self._call(*inputs)
        except Exception as error:
            reason = missing_compiler(error)
            if reason is None:
                raise
        warnings.warn(
            f"The network runs uncompiled, which is slower: {reason}. Install a compiler, or pass "
            "--set model.compile=false (in Python: compiled=False)",
            CompilerWarning,
            stacklevel=2,
        )
        self._call = self._network
        return self._call(*inputs)


def _modules_and_tensors(model: nn.Module) -> tuple[list[nn.Module], list[Tensor]] | None:
    """All modules and tensors of a network; ``None`` if its outputs depend on more than these."""
    if type(model) is not FlowSegModel or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return None
    modules, tensors, todo = [], [], [model]
    while todo:
        module = todo.pop()
        if module is None:
            continue
        package = type(module).__module__.partition(".")[0]
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        if hooked or package not in _KNOWN_PACKAGES:
            return None
        modules.append(module)
        tensors += [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]
        todo += module._modules.values()
    # Subclasses (shards, quantised tensors) are not what they seem.
    plain = all(type(value) in (Tensor, nn.Parameter) for value in tensors)
    return (modules, tensors) if plain else None


def _same(some: list, others: list) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others))


def _same_memory(tensors: list[Tensor], aliases: list[Tensor]) -> bool:
    return len(tensors) == len(aliases) and all(
        tensor.untyped_storage()._cdata == alias.untyped_storage()._cdata
        and tensor.shape == alias.shape
        and tensor.stride() == alias.stride()
        and tensor.storage_offset() == alias.storage_offset()
        for tensor, alias in zip(tensors, aliases)
    )


def _cast_copy(model: nn.Module) -> tuple[nn.Module, tuple[list[Tensor], list[Tensor]]]:
    """A copy in evaluation mode, and its pairs of a weight and a cast weight."""
    # copy.deepcopy takes what is in this table instead of copying it.
    table: dict[int, object] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    originals, casts = [], []
    layers = [module for module in model.modules() if type(module) in _CAST_LAYERS]
    others = (module for module in model.modules() if type(module) not in _CAST_LAYERS)
    kept = {id(value) for module in others for value in module._parameters.values()}
    for layer in layers:
        for value in layer._parameters.values():
            if value is not None and value.dtype == torch.float32 and id(value) not in kept:
                kept.add(id(value))
                cast = nn.Parameter(value.detach().to(torch.bfloat16), requires_grad=False)
                table[id(value)] = cast
                originals.append(value.detach())
                casts.append(cast)
    return copy.deepcopy(model, table).eval(), (originals, casts)
