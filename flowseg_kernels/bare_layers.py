"""Which layers the fused field may read as bare tensors, and the reading.

A fused op takes the weights of a layer instead of calling it. That is right only for a layer whose call does nothing but its
class's formula: no hook, no wrapper, no adapter, no sharded or quantised weight. Any other layer must be called.

FSDP2 and accelerate's offload hook a layer only to bring its weights for the call. Such a layer is called with a `_Probe`, which
brings back the weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, empty, nn
from torch.nn.modules import module as module_hooks
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["any_global_hook", "bare_linear", "bare_norm", "is_bare_linear", "is_bare_norm", "is_exactly", "is_silent"]

#: PyTorch's own forward pre-hooks that set an attribute of the layer from other parameters, and do nothing else.
_SETS_WEIGHT = (WeightNorm, SpectralNorm, BasePruningMethod)
_FSDP2 = "torch.distributed.fsdp"
#: Classes of tensors that replace no function.
_OF_TORCH = (*nn.Parameter.__mro__, nn.Buffer, UninitializedParameter)
#: The classes' own formulas, as they are when this is imported.
_FORWARD = {nn.Linear: nn.Linear.forward, nn.RMSNorm: nn.RMSNorm.forward}


def any_global_hook() -> bool:
    """Whether a hook on all modules is registered (torch.nn.modules.module.register_module_forward_hook and its like)."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def is_exactly(module: nn.Module | None, kind: type) -> bool:
    """Whether `module` is of this class and of no subclass."""
    if type(module) is kind:
        return True
    # torch.export hands out a proxy for every module, of a class made from the module's.
    bases = type(module).__mro__
    return kind in bases and bases[bases.index(kind) - 1].__name__ == "_AttrProxy"


def is_silent(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's forward alone: no hook on it, and no forward of its own (accelerate sets one)."""
    return not module._forward_pre_hooks and not _acts_after_pre_hooks(module)


def _acts_after_pre_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__
    )


def _computes_as(module: nn.Module | None, kind: type) -> bool:
    """Whether `module` is `kind`'s formula on its attributes; PyTorch's parametrizations and pre-hooks may compute these."""
    if kind.forward is not _FORWARD[kind]:
        return False  # somebody replaced it for all layers
    if not is_exactly(module, kind) and not _is_parametrized(module, kind):
        return False
    if _acts_after_pre_hooks(module):
        return False
    return not module._forward_pre_hooks or all(isinstance(v, _SETS_WEIGHT) for v in module._forward_pre_hooks.values())


def _is_parametrized(module: nn.Module | None, kind: type) -> bool:
    # A parametrization makes a subclass of the layer's class and keeps its forward.
    return parametrize.is_parametrized(module) and parametrize.type_before_parametrizations(module) is kind


def _holds_plain_tensors(module: nn.Module) -> bool:
    """Whether no parameter is a wrapper subclass: DTensor's local part, torchao's quantised values are not the weight."""
    # Parametrizations and their parameters are modules in the layer.
    for value in module.parameters() if module._modules else module._parameters.values():
        kind = type(value)
        if kind is not nn.Parameter and (hasattr(kind, "__tensor_flatten__") or _replaces_functions(kind)):
            return False
    return True


def _replaces_functions(kind: type) -> bool:
    """Whether a class of tensors has functions such as F.linear of its own."""
    if kind.__module__.startswith("torch."):
        return False  # what tracing puts in place of a parameter
    return "__torch_function__" in {name for base in kind.__mro__ if base not in _OF_TORCH for name in vars(base)}


def _gets_weights_for_a_call(module: nn.Module | None, kind: type) -> bool:
    """Whether `module` is a `kind` on which FSDP2 or accelerate's offload is the only hook."""
    if not isinstance(module, kind) or module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if hooks:
        # fully_shard makes a class (FSDPModule, kind) and hooks the module with methods of its state.
        first, *others = type(module).__bases__
        return (
            first.__module__.startswith(_FSDP2)
            and others == [kind]
            and "forward" not in module.__dict__
            and all(type(getattr(v, "__self__", None)).__module__.startswith(_FSDP2) for v in hooks)
        )
    return type(module) is kind and _is_offloaded(module, kind)


def _is_offloaded(module: nn.Module, kind: type) -> bool:
    hook, forward = module.__dict__.get("_hf_hook"), module.__dict__.get("forward")
    return (
        type(hook).__module__ == "accelerate.hooks"
        and type(hook).__name__ == "AlignDevicesHook"
        and getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks"
        and getattr(module.__dict__.get("_old_forward"), "__func__", None) is kind.forward
    )


class _Probe(Tensor):
    """An input for which a Linear or an RMSNorm gives copies of its weights instead of its output.

    Copies, as whoever brought the weights takes them away when the call ends.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return tuple(v.clone() for v in args[1:])
        if func is F.rms_norm:
            return (kwargs["weight"].clone(),)
        return super().__torch_function__(func, types, args, kwargs)


def is_bare_linear(module: nn.Module | None) -> bool:
    """Whether `bare_linear` gives all that a call of `module` would use."""
    plain = _computes_as(module, nn.Linear) and _holds_plain_tensors(module)
    return (plain or _gets_weights_for_a_call(module, nn.Linear)) and module.bias is not None


def is_bare_norm(module: nn.Module | None, eps: float, *, sharded: bool = False) -> bool:
    """Whether `bare_norm` gives all that a call of `module` would use, when it is an RMSNorm with this eps.

    Args:
        sharded: the module that holds this one gathers its weight in the call that reads it.
    """
    plain = _computes_as(module, nn.RMSNorm) and (sharded or _holds_plain_tensors(module))
    if not plain and not _gets_weights_for_a_call(module, nn.RMSNorm):
        return False
    return module.eps == eps and module.elementwise_affine


def _brought(module: nn.Module) -> tuple[Tensor, ...] | None:
    """Weights of a call of `module` that come with the call; None when they are the module's attributes, which are then set."""
    if _acts_after_pre_hooks(module):
        return module(empty(0).as_subclass(_Probe))
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return None


def bare_linear(module: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of this call of a layer for which `is_bare_linear` holds."""
    return _brought(module) or (module.weight, module.bias)


def bare_norm(module: nn.RMSNorm) -> Tensor:
    """Gain of this call of a norm for which `is_bare_norm` holds."""
    brought = _brought(module)
    return brought[0] if brought else module.weight
