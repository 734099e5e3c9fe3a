"""The backward of the neural field's blocks by itself, on the host: states, gradients and scratch of every shape.

The tests of the op run it with what the other kernels make. Here the states are random, all memory that the kernel must not use is
NaN, and a round may be some of the patches.
"""

import ctypes
import dataclasses

import pytest
import torch
from torch.nn import functional

from ...host_cuda import kernels as host_kernels
from ...support.field_tiles import BF16, FP16, NAN, TILE, PaddedSizes, assert_near

FAULTS = ("swizzle", "proxy_fence", "early_load", "transposed", "wait_group")


class BackwardCall(ctypes.Structure):
    """`BackwardCall` of tests/host_cuda/field_backward.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "gains", "grad_weights", "states", "later_states")),
        *((name, ctypes.c_void_p) for name in ("inverse_lengths", "inverse_rms", "along2", "dn_sums", "gain_sums")),
        *((name, ctypes.c_int64) for name in ("hidden", "inner", "p", "depth", "patches", "first", "count")),
        *((name, ctypes.c_int64) for name in ("both", "residual", "aliased", "is_half", "multiprocessors")),
    ]


@pytest.fixture(scope="module")
def library(kernels):
    return host_kernels.kernel_library("field_backward")


@dataclasses.dataclass
class Blocks(PaddedSizes):
    """Random inputs of the backward of blocks, and its results."""

    hidden: int = 64
    ratio: int = 2
    p: int = 16
    depth: int = 2
    patches: int = 3
    first: int = 0
    count: int = 3
    both: bool = True
    residual: bool = True
    aliased: bool = False
    dtype: torch.dtype = BF16
    multiprocessors: int = 2
    zero_columns: bool = False

    def __post_init__(self):
        torch.manual_seed(0)
        self.pad()
        size = 2 * self.inner * self.hidden
        self.weights = (
            torch.randn(self.patches, self.depth, size) * (0.3 + torch.rand(self.patches, self.depth, 1))
        ).to(self.dtype)
        if self.zero_columns:
            for w in self.split(self.weights):
                w[..., 3] = 0
        self.gains = (1 + 0.3 * torch.randn(self.depth, self.hidden)).to(self.dtype)
        normal = torch.randn(self.count, self.depth, self.pixels, self.hidden)
        self.normal = (normal / normal.square().mean(-1, keepdim=True).sqrt()).to(self.dtype)
        self.g = torch.randn(self.count, self.pixels, self.hidden).to(self.dtype)
        self.rms = 0.5 + torch.rand(self.count, self.depth, self.pixels)

    def split(self, weights):
        """W1 and W2 of `weights`, which may be the gradients."""
        w1, w2 = weights.view(self.patches, self.depth, -1).split(self.inner * self.hidden, dim=2)
        return w1.unflatten(2, (self.hidden, self.inner)), w2.unflatten(2, (self.inner, self.hidden))

    def of_round(self, v):
        return v[self.first : self.first + self.count]

    def run(self, library):
        """Run the kernel. Return the gradients of W1, W2, the state and the gains, and all memory that it has written."""
        padded = self.padded_inner
        inverse = torch.full((self.count, self.depth, padded + self.padded_hidden), NAN)
        w1, w2 = (self.of_round(w).float() for w in self.split(self.weights))
        inverse[..., : self.inner] = 1 / w1.norm(dim=2).clamp_min(1e-12)
        inverse[..., padded : padded + self.hidden] = 1 / w2.norm(dim=2).clamp_min(1e-12) if self.both else 1
        rms = torch.full((self.count, self.depth + 1, self.tiles * TILE), float("inf"))
        rms[:, : self.depth, : self.pixels] = self.rms
        grads, states = (
            torch.full_like(self.weights, NAN),
            torch.full((self.count, 2, self.tiles * TILE * self.padded_hidden), NAN, dtype=self.dtype),
        )
        later = torch.full((self.count, max(1, self.depth - 1), states.shape[2]), NAN, dtype=self.dtype)
        for i in range(self.count):
            states[i, 0], states[i, 1] = self.to_tiles(self.normal[i, 0], 3), self.to_tiles(self.g[i], 0)
            for level in range(1, self.depth):
                to = grads[self.first + i, level - 1] if self.aliased else later[i, level - 1]
                tiles = self.to_tiles(self.normal[i, level], 3)
                to[: len(tiles)] = tiles
        along2 = torch.full((self.count, self.depth, self.padded_hidden), NAN)
        gain_sums = torch.full((self.patches, self.depth, self.padded_hidden), NAN)
        dn_sums = torch.full((min(self.count, self.multiprocessors), self.tiles, TILE * self.padded_hidden), NAN)
        tensors = (self.weights, self.gains, grads, states, later, inverse, rms, along2, dn_sums, gain_sums)
        numbers = (self.hidden, self.inner, self.p, self.depth, self.patches, self.first, self.count, self.both, self.residual,
                   self.aliased, self.dtype == FP16, self.multiprocessors)  # fmt: skip
        failure = library.field_backward_blocks(ctypes.byref(BackwardCall(*(t.data_ptr() for t in tensors), *numbers)))
        assert not failure, failure.decode()

        d1, d2 = (self.of_round(d).double() for d in self.split(grads))
        if self.both and self.slices > 1:  # the kernel `project` does this
            factor = inverse[..., padded : padded + self.hidden] ** 3 * along2[..., : self.hidden]
            d2 = (d2 - w2 * factor[:, :, None]).to(self.dtype).double()
        state = self.from_tiles(states[:, 1])
        assert not state[:, self.pixels :].any() and not state[..., self.hidden :].any()
        others = torch.ones(self.patches, dtype=torch.bool)
        self.of_round(others)[:] = False
        assert grads[others].isnan().all()
        gains = self.of_round(gain_sums)[..., : self.hidden].double()
        found = {"dW1": d1, "dW2": d2, "g": state[:, : self.pixels, : self.hidden].double(), "gains": gains}
        return found, [v.view(torch.int16) for v in (grads, states, gain_sums)]

    def expected(self, dtype):
        """The same gradients by autograd in a dtype."""
        w1, w2 = (self.of_round(w).to(dtype) for w in self.split(self.weights))
        rows = []
        g = self.g.to(dtype)
        for level in reversed(range(self.depth)):
            normal, rms = self.normal[:, level].to(dtype), self.rms[:, level, :, None].to(dtype)
            gain = self.gains[level].to(dtype).expand(self.count, 1, -1)
            leaves = [v.clone().requires_grad_() for v in (w1[:, level], w2[:, level], normal, gain)]
            first, second, entered, scale = leaves
            if self.residual:
                entered = entered * scale
            second = functional.normalize(second, dim=1) if self.both else second
            out = functional.silu(entered @ functional.normalize(first, dim=1)) @ second
            d1, d2, dn, d_gain = torch.autograd.grad(out, leaves, g, allow_unused=True)
            g = g + rms * (dn - normal * (dn * normal).mean(-1, keepdim=True)) if self.residual else dn
            rows.insert(0, (d1, d2, d_gain[:, 0] if self.residual else gain[:, 0]))
        d1, d2, gains = (torch.stack(column, 1).double() for column in zip(*rows))
        return {"dW1": d1, "dW2": d2, "g": g.double(), "gains": gains}


def assert_right(blocks, found):
    exact, plain = blocks.expected(torch.float64), blocks.expected(blocks.dtype)
    for name, want in exact.items():
        if name == "gains" and not blocks.residual:
            continue
        exists = torch.ones_like(want, dtype=torch.bool)
        if blocks.zero_columns and name in ("dW1", "dW2"):
            # The gradient of a zero column is 1e12 times too large to compare it with the others, or leaves fp16's range.
            exists[..., 3] = False
        assert_near(found[name][exists], plain[name][exists], want[exists], blocks.dtype, name)


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("both", [True, False], ids=["both", "first"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_variants(library, dtype, both, residual, hidden):
    blocks = Blocks(dtype=dtype, both=both, residual=residual, aliased=True, hidden=hidden)
    assert_right(blocks, blocks.run(library)[0])


# 1, 2, 4, 7 and 16 tiles, of which 8, 16 and 32 pixels along a side fill theirs.
@pytest.mark.many_forms(5)
@pytest.mark.parametrize("hidden", [32, 72])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("p", [5, 8, 11, 16, 20, 32])
def test_tiles(library, p, depth, hidden):
    blocks = Blocks(p=p, depth=depth, hidden=hidden)
    assert_right(blocks, blocks.run(library)[0])


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("both", [True, False], ids=["both", "first"])
@pytest.mark.parametrize("ratio", [1, 2, 4, 5])
@pytest.mark.parametrize("hidden", [8, 24, 40, 64, 72, 96, 128])
def test_sizes_of_the_weights(library, hidden, ratio, both):
    blocks = Blocks(hidden=hidden, ratio=ratio, both=both, p=9, dtype=FP16 if hidden in (40, 96) else BF16)
    assert_right(blocks, blocks.run(library)[0])


@pytest.mark.many_forms(5)
@pytest.mark.parametrize(("hidden", "ratio"), [(64, 2), (64, 4), (128, 1)])
@pytest.mark.parametrize("both", [True, False], ids=["both", "first"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_zero_columns(library, dtype, both, hidden, ratio):
    blocks = Blocks(dtype=dtype, both=both, hidden=hidden, ratio=ratio, p=8, zero_columns=True)
    found = blocks.run(library)[0]
    assert_right(blocks, found)
    if dtype == BF16:
        exact = blocks.expected(torch.float64)
        for name in ("dW1", "dW2"):
            column, want = found[name][..., 3], exact[name][..., 3]
            assert (column - want).norm() <= 0.02 * want.norm(), name


@pytest.mark.parametrize(("hidden", "ratio"), [(64, 2), (64, 4), (128, 2)])
@pytest.mark.parametrize("p", [8, 16])
def test_a_round_repeats_bit_for_bit_on_any_number_of_blocks(library, p, hidden, ratio):
    sizes = {"p": p, "hidden": hidden, "ratio": ratio, "patches": 7, "first": 1, "count": 5}
    runs = [
        Blocks(**sizes, aliased=aliased, multiprocessors=multiprocessors).run(library)
        for aliased, multiprocessors in ((False, 1), (False, 1), (True, 2), (False, 5))
    ]
    for found, written in runs[1:]:
        assert all(torch.equal(v, runs[0][0][name]) for name, v in found.items())
        assert all(torch.equal(a, b) for a, b in zip(written, runs[0][1]))


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(library, fault, hidden):
    blocks = Blocks(hidden=hidden)
    library.plant_fault(fault.encode())
    try:
        with pytest.raises(AssertionError):
            assert_right(blocks, blocks.run(library)[0])
    finally:
        library.plant_fault(b"")
    assert_right(blocks, blocks.run(library)[0])
