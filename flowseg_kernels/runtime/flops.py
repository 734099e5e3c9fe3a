"""FLOPs of ops for torch.utils.flop_counter.FlopCounterMode, which counts an op without a formula as 0."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable

import torch

__all__ = ["define_flops"]

_COUNTER = "torch.utils.flop_counter"
#: Op name -> formula.
_FORMULAS: dict[str, Callable[..., int]] = {}


def define_flops(name: str, formula: Callable[..., int]) -> None:
    """Give PyTorch's counter the formula of the op `flowseg::NAME`.

    Args:
        name: NAME.
        formula: the op's arguments, with the shape in place of each tensor -> FLOPs.
    """
    _FORMULAS[name] = formula
    if not any(isinstance(finder, _AfterCounter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterCounter())
    if _COUNTER in sys.modules:
        _register(name)


def _register(name: str) -> None:
    formula = _FORMULAS[name]
    register = sys.modules[_COUNTER].register_flop_formula
    register(getattr(torch.ops.flowseg, name))(lambda *args, out_shape, **more: formula(*args, **more))


class _AfterCounter(importlib.abc.MetaPathFinder):
    """Registers the formulas whenever PyTorch's counter is imported or reloaded.

    The counter is not imported for this, because torch 2.13 then imports Triton: 0.2 s at every import of this package.
    """

    def find_spec(self, name, path, target=None):
        # A program may ask for the spec without importing the module, so nothing changes before the module runs.
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module):
            load(module)
            for op in _FORMULAS:
                _register(op)

        spec.loader.exec_module = load_and_register
        return spec
