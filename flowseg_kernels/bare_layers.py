"""Which layers the fused field may read as bare tensors, and the reading.

A fused op takes the weights of a layer instead of calling it. That is right only for a layer whose call does nothing but its
class's formula: no hook, no wrapper, no adapter, no sharded or quantised weight. Any other layer must be called.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["any_global_hook", "bare_linear", "bare_norm", "is_bare_linear", "is_bare_norm", "is_silent"]

#: PyTorch's own forward pre-hooks that set an attribute of the layer from other parameters, and do nothing else.
_SETS_WEIGHT = (WeightNorm, SpectralNorm, BasePruningMethod)


def any_global_hook() -> bool:
    """Whether a hook on all modules is registered (torch.nn.modules.module.register_module_forward_hook and its like)."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def is_silent(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward alone: no hook on it, and no forward of its own (accelerate sets one)."""
    return not module._forward_pre_hooks and _has_no_other_hook(module)


def _has_no_other_hook(module: nn.Module) -> bool:
    return not (
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def _computes_as(module: nn.Module | None, kind: type) -> bool:
    """Whether `module` is `kind`'s formula on its attributes; PyTorch's parametrizations and pre-hooks may compute these."""
    if type(module) is not kind:
        # A parametrization makes a subclass of the layer's class and keeps its forward.
        if not parametrize.is_parametrized(module) or parametrize.type_before_parametrizations(module) is not kind:
            return False
    if not _has_no_other_hook(module):
        return False
    return not module._forward_pre_hooks or all(isinstance(v, _SETS_WEIGHT) for v in module._forward_pre_hooks.values())


def _holds_plain_tensors(module: nn.Module) -> bool:
    """Whether no parameter is a wrapper subclass: DTensor's local part, torchao's quantised values are not the weight."""
    own = module.parameters() if parametrize.is_parametrized(module) else module._parameters.values()
    return not any(hasattr(type(v), "__tensor_flatten__") for v in own)


def is_bare_linear(module: nn.Module | None) -> bool:
    """Whether `bare_linear` gives all that a call of `module` would use."""
    return _computes_as(module, nn.Linear) and _holds_plain_tensors(module) and module.bias is not None


def is_bare_norm(module: nn.Module | None, eps: float, *, sharded: bool = False) -> bool:
    """Whether `bare_norm` gives all that a call of `module` would use, when it is an RMSNorm with this eps.

    Args:
        sharded: the module that holds this one gathers its weight in the call that reads it.
    """
    if not _computes_as(module, nn.RMSNorm) or module.eps != eps or not module.elementwise_affine:
        return False
    return sharded or _holds_plain_tensors(module)


def _with_attributes_set(module: nn.Module) -> nn.Module:
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module


def bare_linear(module: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of this call of a layer for which `is_bare_linear` holds."""
    module = _with_attributes_set(module)
    return module.weight, module.bias


def bare_norm(module: nn.RMSNorm) -> Tensor:
    """Gain of this call of a norm for which `is_bare_norm` holds."""
    return _with_attributes_set(module).weight
