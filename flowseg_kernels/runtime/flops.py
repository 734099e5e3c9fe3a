"""FLOPs of ops for torch.utils.flop_counter.FlopCounterMode, which counts an op without a formula as 0."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

import torch

__all__ = ["define_flops"]

_COUNTER = "torch.utils.flop_counter"
#: Op name -> formula, for formulas that PyTorch's counter has not got yet.
_WAITING: dict[str, Callable[..., int]] = {}


def define_flops(name: str, formula: Callable[..., int]) -> None:
    """Give PyTorch's counter the formula of the op `flowseg::NAME`.

    Args:
        name: NAME.
        formula: the op's arguments, with the shape in place of each tensor -> FLOPs.
    """
    _WAITING[name] = formula
    if _COUNTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterCounter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterCounter())


def _register() -> None:
    while _WAITING:
        name, formula = _WAITING.popitem()
        register = sys.modules[_COUNTER].register_flop_formula
        register(getattr(torch.ops.flowseg, name))(lambda *args, out_shape, f=formula, **more: f(*args, **more))


class _AfterCounter(importlib.abc.MetaPathFinder):
    """Registers the waiting formulas when PyTorch's counter is imported.

    The counter is not imported for this, because torch 2.13 then imports Triton: 0.2 s at every import of this package.
    """

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module):
            load(module)
            _register()

        spec.loader.exec_module = load_and_register
        return spec
