"""Read the weights of layers for the fused field, and decide for which layers that is correct.

A fused op reads the weights of a layer instead of calling the layer. That is correct only if a call would compute just the formula
of the layer's class: no hook, no wrapper, no adapter, no sharded or quantised weight. Any other layer must be called.

There is one exception: FSDP2 and accelerate's offload hook a layer only to bring its weights for the call. This module calls such a
layer with a `_Probe`, which returns the weights.
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

#: PyTorch's forward pre-hooks that only set an attribute of the layer from other parameters.
_SETS_WEIGHT = (WeightNorm, SpectralNorm, BasePruningMethod)
_FSDP2 = "torch.distributed.fsdp"
#: Classes of tensors that override no function.
_OF_TORCH = (*nn.Parameter.__mro__, nn.Buffer, UninitializedParameter)
#: The forward of each class at import, to notice a later replacement.
_FORWARD = {nn.Linear: nn.Linear.forward, nn.RMSNorm: nn.RMSNorm.forward}


def any_global_hook() -> bool:
    """Whether a hook on all modules is registered, for example by torch.nn.modules.module.register_module_forward_hook."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def is_exactly(module: nn.Module | None, kind: type) -> bool:
    """Whether `module` is an instance of this class and not of a subclass."""
    if type(module) is kind:
        return True
    # torch.export replaces each module by a proxy, an instance of a generated subclass.
    bases = type(module).__mro__
    return kind in bases and bases[bases.index(kind) - 1].__name__ == "_AttrProxy"


def is_silent(module: nn.Module) -> bool:
    """Whether a call of `module` runs only its class's forward: no hook, and no forward set on the instance, as accelerate does."""
    return not module._forward_pre_hooks and not _acts_after_pre_hooks(module)


def _acts_after_pre_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__
    )


def _computes_as(module: nn.Module | None, kind: type) -> bool:
    """Whether a call of `module` computes `kind`'s formula from its attributes, which parametrizations and pre-hooks may set."""
    if kind.forward is not _FORWARD[kind]:
        return False  # replaced for all layers
    if not is_exactly(module, kind) and not _is_parametrized(module, kind):
        return False
    if _acts_after_pre_hooks(module):
        return False
    return not module._forward_pre_hooks or all(isinstance(v, _SETS_WEIGHT) for v in module._forward_pre_hooks.values())


def _is_parametrized(module: nn.Module | None, kind: type) -> bool:
    # A parametrized layer has a generated subclass of its class, with the same forward.
    return parametrize.is_parametrized(module) and parametrize.type_before_parametrizations(module) is kind


def _holds_plain_tensors(module: nn.Module) -> bool:
    """Whether no parameter is a wrapper subclass: the data of a DTensor or of torchao's quantised tensor are not the weight."""
    # A parametrization is a submodule with parameters.
    for value in module.parameters() if module._modules else module._parameters.values():
        kind = type(value)
        if kind is not nn.Parameter and (hasattr(kind, "__tensor_flatten__") or _replaces_functions(kind)):
            return False
    return True


def _replaces_functions(kind: type) -> bool:
    """Whether a class of tensors overrides functions such as F.linear."""
    if kind.__module__.startswith("torch."):
        return False  # tracing replaces parameters by tensors of torch
    return "__torch_function__" in {name for base in kind.__mro__ if base not in _OF_TORCH for name in vars(base)}


def _gets_weights_for_a_call(module: nn.Module | None, kind: type) -> bool:
    """Whether `module` is a `kind` with no hook but that of FSDP2 or of accelerate's offload."""
    if not isinstance(module, kind) or module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if hooks:
        # fully_shard changes the class to one with the bases (FSDPModule, kind), and its hooks are methods of FSDP's state.
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
    """An input for which a Linear or an RMSNorm returns copies of its weights instead of its output.

    They are copies, as the hook takes the weights away when the call ends.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return tuple(v.clone() for v in args[1:])
        if func is F.rms_norm:
            return (kwargs["weight"].clone(),)
        return super().__torch_function__(func, types, args, kwargs)


def is_bare_linear(module: nn.Module | None) -> bool:
    """Whether `bare_linear` returns everything that a call of `module` would use."""
    plain = _computes_as(module, nn.Linear) and _holds_plain_tensors(module)
    return (plain or _gets_weights_for_a_call(module, nn.Linear)) and module.bias is not None


def is_bare_norm(module: nn.Module | None, eps: float, *, sharded: bool = False) -> bool:
    """Whether `module` is an RMSNorm with this eps, and `bare_norm` returns everything that its call would use.

    Args:
        sharded: whether the parent module gathers the weight during its own call, in which the weight is read.
    """
    plain = _computes_as(module, nn.RMSNorm) and (sharded or _holds_plain_tensors(module))
    if not plain and not _gets_weights_for_a_call(module, nn.RMSNorm):
        return False
    return module.eps == eps and module.elementwise_affine


def _brought(module: nn.Module) -> tuple[Tensor, ...] | None:
    """The weights of a call of `module`. None if they are the module's attributes; then its pre-hooks have set them."""
    if _acts_after_pre_hooks(module):
        return module(empty(0).as_subclass(_Probe))
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return None


def bare_linear(module: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer for which `is_bare_linear` is true, for this call."""
    return _brought(module) or (module.weight, module.bias)


def bare_norm(module: nn.RMSNorm) -> Tensor:
    """Gain of a norm for which `is_bare_norm` is true, for this call."""
    brought = _brought(module)
    return brought[0] if brought else module.weight
