"""PyTorch's FLOP counter counts the products of neural_field and of its backward as those of the plain formula."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import flowseg_kernels as fk
from flowseg_kernels.runtime import flops

from ..support.neural_field import field_inputs, pixnerd_field

P, RATIO, FREQS = 4, 2, 4
#: Inputs that need a gradient: all, as in training (not x), only the generated weights, and single ones.
NEEDS = {
    "all": range(8),
    "training": range(1, 8),
    "generated weights": [1],
    "x": [0],
    "gains": [4],
    "last layer": [6, 7],
    "last gain": [5],
}


def counted(call, inputs, needs):
    """FLOPs of the forward and of the backward."""
    leaves = [v if v is None else v.detach().requires_grad_(i in needs) for i, v in enumerate(inputs)]
    with FlopCounterMode(display=False) as forward:
        out = call(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.ones_like(out))
    return forward.get_total_flops(), backward.get_total_flops()


#: (normalise, form) and what needs a gradient. The plain form has no gains.
CASES = [(("both", "residual"), needs) for needs in NEEDS]
CASES += [(("first", "plain"), needs) for needs in NEEDS if "gain" not in needs]


@pytest.mark.parametrize(("variant", "needs"), CASES, ids=["-".join((*variant, needs)) for variant, needs in CASES])
def test_the_counter_counts_the_products_of_the_formula(variant, needs):
    inputs = field_inputs(3, 16, 3, RATIO, P, FREQS, torch.float32, height=P, width=2 * P, form=variant[1])
    needed = [i for i in NEEDS[needs] if inputs[i] is not None]
    options = {"patch_size": P, "mlp_ratio": RATIO, "normalise": variant[0], "form": variant[1]}
    ours = counted(lambda *v: fk.neural_field(*v, **options), inputs, needed)
    plain = counted(lambda *v: pixnerd_field(*v, P, RATIO, variant), inputs, needed)
    # The plain formula multiplies the cosine features again for every patch, and computes their gradient together with that of x.
    patches, table = inputs[1].shape[0] * inputs[1].shape[1], 2 * P**2 * FREQS**2 * 16
    assert ours[0] == plain[0] - (patches - 1) * table > 0
    assert ours[1] == plain[1] - (patches - 1) * table * (2 in needed) - patches * table * (0 in needed) > 0


def test_the_counter_counts_a_field_without_blocks_or_patches():
    for change in ({"depth": 0}, {"batch": 0}):
        inputs = field_inputs(dtype=torch.float32, **change)
        forward, backward = counted(lambda *v: fk.neural_field(*v, patch_size=P), inputs, range(8))
        assert forward > 0 and backward > 0


@pytest.mark.parametrize("first", ["", "import torch.utils.flop_counter"], ids=["package first", "counter first"])
def test_the_formulas_are_registered_whenever_the_counter_is_imported(first):
    """The package leaves the import to those who count: the counter of torch 2.13 imports Triton."""
    code = f"""
import importlib.util, sys, torch
{first}
counter = "torch.utils.flop_counter"
imported = counter in sys.modules
import flowseg_kernels
assert (counter in sys.modules) == imported
formulas = {{torch.ops.flowseg.neural_field, torch.ops.flowseg.neural_field_bwd}}
assert importlib.util.find_spec(counter)
assert formulas <= importlib.import_module(counter).flop_registry.keys(), "after a search for the module"
assert formulas <= importlib.reload(sys.modules[counter]).flop_registry.keys(), "after a reload"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_formula_is_registered_at_once_if_the_counter_is_imported():
    op = torch.ops.flowseg.flow_interpolate
    flops.define_flops("flow_interpolate", lambda source, labels, t, *rest: 1000 + source[-1])
    try:
        codes = torch.zeros(2, 3)
        with FlopCounterMode(display=False) as counter:
            fk.flow_interpolate(
                torch.zeros(1, 3, 2, 5), torch.zeros(1, 2, 5, dtype=torch.uint8), torch.ones(1), fk.Codebook(codes)
            )
    finally:
        del flop_registry[op], flops._FORMULAS["flow_interpolate"]
    assert counter.get_total_flops() == 1005
