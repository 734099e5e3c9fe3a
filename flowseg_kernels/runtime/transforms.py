"""Call a registered op from Python: in eager code, under torch.compile and inside torch.func transforms.

torch.func cannot differentiate an op registered with torch.library; it can differentiate an autograd.Function with a separate
setup_context. So every op with a backward rule gets two Functions. One is used inside transforms: grad and vjp run the op's own
backward, vmap runs the op once per batch element, and forward mode is an error that names the op. The other one is a fast path
for eager code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import TransformType, retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

__all__ = ["call", "check_no_forward_mode", "define_transforms", "in_transform", "under_transform"]

_IN_TRANSFORMS: dict[str, type[torch.autograd.Function]] = {}
_IN_EAGER: dict[str, type[torch.autograd.Function]] = {}
#: Ops whose tensors autocast casts.
_CAST: set[str] = set()


def in_transform() -> bool:
    """Whether this code runs inside a torch.func transform or in forward mode."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def under_transform(*values) -> bool:
    """Whether a tensor carries a forward-mode derivative or is wrapped by torch.func."""
    return in_transform() and any(
        torch._C._functorch.is_functorch_wrapped_tensor(v)
        or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(v).tangent is not None)
        for v in values
        if isinstance(v, Tensor)
    )


def check_no_forward_mode(op: str, *tensors: Tensor) -> None:
    """Refuse forward-mode derivatives: they would pass through the op as zero, without an error.

    Raises:
        NotImplementedError: naming the op.
    """
    if under_transform(*tensors) and any(map(_has_tangent, tensors)):
        raise NotImplementedError(_no_forward_mode(op))


def _no_forward_mode(op: str) -> str:
    return (
        f"{op}: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, forward_ad) are not supported; use reverse mode "
        f"(torch.autograd, torch.func.grad, vjp), or the plain formula in flowseg_kernels.ops.{op.removesuffix('_bwd')}.reference"
    )


def _has_tangent(value: Tensor) -> bool:
    kinds = {i.level(): i.key() for i in retrieve_all_functorch_interpreters()}
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if kinds.get(functorch.maybe_get_level(value)) == TransformType.Jvp:
            return True
        value = functorch.get_unwrapped(value)
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def call(name: str, *args):
    """torch.ops.flowseg.NAME(*args), inside torch.func.grad, vjp, jacrev and vmap too."""
    if under_transform(*args):
        return _IN_TRANSFORMS[name].apply(*args)
    op = getattr(torch.ops.flowseg, name).default
    if name not in _IN_EAGER or torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled():
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                if in_transform():  # of other tensors
                    return _IN_TRANSFORMS[name].apply(*args)
                return op(*args) if _may_be_cast(name, args[0]) else _IN_EAGER[name].apply(*args)
    # Skip the op's own autograd rule: it would only find that nothing needs a gradient.
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _may_be_cast(name: str, x: Tensor) -> bool:
    """Whether autocast may cast the op's tensors. PyTorch answers that for CPU and CUDA tensors only."""
    return name in _CAST and (x.device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(x.device.type))


def define_transforms(
    name: str, library: torch.library.Library, backward: Callable, setup_context: Callable, autocast: bool
) -> None:
    """Make the op `flowseg::NAME`, registered with the rule (backward, setup_context), callable inside transforms.

    Also register an eager fast path: PyTorch's Python wrapper around an op with an autograd rule costs 0.1 ms per call at 17
    arguments. `call` skips it under autocast for ops that autocast casts, as PyTorch's rule has to record the casts.
    """
    op = getattr(torch.ops.flowseg, name).default

    def jvp(ctx, *tangents):
        raise NotImplementedError(_no_forward_mode(name))

    _IN_TRANSFORMS[name] = type(
        f"{name}_in_transforms",
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "jvp": staticmethod(jvp),
        },
    )

    def forward(ctx, *args):
        # Skip the op's own autograd rule: it would only find that nothing needs a gradient.
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    if autocast:
        _CAST.add(name)
    _IN_EAGER[name] = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def one_by_one(info, in_dims, *args):
        """Run the op once per batch element, as a reduction or a count belongs to one batch of images."""
        places = [dim if isinstance(value, Tensor) else None for value, dim in zip(args, in_dims)]
        outs = [op(*(v if d is None else v.select(d, i) for v, d in zip(args, places))) for i in range(info.batch_size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(map(torch.stack, zip(*outs))), (0,) * len(outs[0])

    torch.library.register_vmap(f"flowseg::{name}", one_by_one, lib=library)
