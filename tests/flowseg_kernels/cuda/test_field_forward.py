"""The forward kernel of the neural field by itself, on the host: the output, and the states that it stores for the backward.

The tests of the op run it for whole images. Here all memory that the kernel must not use is NaN, and a round may be some of the
patches.
"""

import ctypes
import dataclasses

import pytest
import torch
from torch.nn import functional

from flowseg_kernels.ops.neural_field import reference

from ...host_cuda import kernels as host_kernels
from ...support.field_tiles import BF16, FP16, NAN, TILE, PaddedSizes, assert_near

POINTERS = ("x", "weights", "embed", "gains", "out_gain", "out_weight", "out_bias", "out", "states", "later_states",
            "grad_weights", "table", "inverse_lengths", "inverse_rms")  # fmt: skip


class ForwardCall(ctypes.Structure):
    """`ForwardCall` of tests/host_cuda/field_forward.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *(
            (name, ctypes.c_int64)
            for name in ("hidden", "inner", "p", "freqs", "depth", "columns", "per_image", "batch")
        ),
        ("channels", ctypes.c_int64),
        ("stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("first", "count", "both", "residual", "keep", "aliased", "is_half")),
        ("multiprocessors", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


@pytest.fixture(scope="module")
def library(kernels):
    return host_kernels.kernel_library("field_forward")


@dataclasses.dataclass
class Field(PaddedSizes):
    """Random inputs of the forward, and its results."""

    hidden: int = 64
    ratio: int = 2
    p: int = 16
    depth: int = 2
    batch: int = 1
    down: int = 1  # patches along an image
    across: int = 3
    channels: int = 3
    freqs: int = 2
    first: int = 0
    both: bool = True
    residual: bool = True
    aliased: bool = False
    dtype: torch.dtype = BF16
    multiprocessors: int = 2
    zero_columns: bool = False
    strided: bool = False
    scale: float = 1.0  # of the embedding
    zero_table: bool = False  # the embedding adds nothing to the channels
    eps: float = 1e-6

    def __post_init__(self):
        torch.manual_seed(0)
        self.pad()
        self.per_image = self.down * self.across
        self.patches = self.batch * self.per_image
        self.count = self.patches - self.first
        size = (self.batch, self.channels, self.down * self.p, self.across * self.p)
        self.x = torch.randn(size).to(self.dtype)
        if self.strided:
            room = torch.full((size[0], size[2] * 2, size[1] + 1, size[3] + 3), NAN, dtype=self.dtype)
            self.x = room.permute(0, 2, 1, 3)[:, 1:, ::2, 1:-2].copy_(self.x)
        weights = 0.3 * torch.randn(self.patches, self.depth, 2, self.inner * self.hidden) + 0.02
        if self.zero_columns:
            weights[:, :, 0].view(self.patches, self.depth, self.hidden, self.inner)[..., 5] = 0
            weights[:, :, 1].view(self.patches, self.depth, self.inner, self.hidden)[..., 7] = 0
        self.weights = (weights if self.both else weights * 0.3).to(self.dtype)
        features = self.channels + self.freqs**2
        self.embed = (self.scale * 0.5 * torch.randn(self.hidden, features)).to(self.dtype)
        self.bias = (self.scale * 0.3 * torch.randn(self.hidden)).to(self.dtype)
        if self.zero_table:
            self.embed[:, self.channels :] = 0
            self.bias.zero_()
        self.gains = (1 + 0.3 * torch.randn(self.depth, self.hidden)).to(self.dtype)
        self.out_gain = (1 + 0.3 * torch.randn(self.hidden)).to(self.dtype)
        self.out_weight = (0.2 * torch.randn(self.channels, self.hidden)).to(self.dtype)
        self.out_bias = (0.1 * torch.randn(self.channels)).to(self.dtype)

    def split(self):
        """W1 and W2 of all patches and blocks."""
        w1 = self.weights[:, :, 0].view(self.patches, self.depth, self.hidden, self.inner)
        return w1, self.weights[:, :, 1].view(self.patches, self.depth, self.inner, self.hidden)

    def waves(self, dtype):
        return reference.cosine_features(self.p, self.freqs, dtype=dtype, device="cpu")

    def inverse_lengths(self):
        return [1 / w.double().norm(dim=2).clamp_min(1e-12) for w in self.split()]

    def run(self, library, keep=False):
        """Run the kernel. Return all memory that it may write."""
        table = torch.full((self.tiles * TILE, self.padded_hidden), NAN)
        embedded = self.waves(torch.float64) @ self.embed[:, self.channels :].double().T + self.bias.double()
        table[: self.pixels, : self.hidden] = embedded.float()
        padded, state = self.padded_inner, self.tiles * TILE * self.padded_hidden
        inverse = torch.full((self.count, self.depth, padded + self.padded_hidden), NAN)
        if self.both and self.slices > 1:  # the kernel `lengths` does this
            inverse[..., padded:] = 1e12
            inverse[..., padded : padded + self.hidden] = self.inverse_lengths()[1][self.first :]
        written = {
            "out": torch.full(self.x.shape, NAN, dtype=self.dtype),
            "states": torch.full((self.count, 2, state), NAN, dtype=self.dtype),
            "later_states": torch.full((self.count, max(1, self.depth - 1), state), NAN, dtype=self.dtype),
            "grad_weights": torch.full_like(self.weights, NAN),
            "inverse_lengths": inverse,
            "inverse_rms": torch.full((self.count, self.depth + 1, self.tiles * TILE), NAN),
        }
        tensors = {**{name: getattr(self, name, None) for name in POINTERS}, "table": table, **written}
        numbers = (self.hidden, self.inner, self.p, self.freqs, self.depth, self.across, self.per_image, self.batch,
                   self.channels, (ctypes.c_int64 * 4)(*self.x.stride()), self.first, self.count, self.both, self.residual,
                   keep, self.aliased, self.dtype == FP16, self.multiprocessors, self.eps)  # fmt: skip
        call = ForwardCall(*(tensors[name].data_ptr() for name in POINTERS), *numbers)
        failure = library.field_forward_blocks(ctypes.byref(call))
        assert not failure, failure.decode()
        return written

    def state(self, written, level):
        """The stored state before block `level`, or after the last one: (patches, rows of whole tiles, whole halves)."""
        later = written["grad_weights"][self.first :].flatten(2) if self.aliased else written["later_states"]
        stored = written["states"][:, int(level > 0)] if level in (0, self.depth) else later[:, level - 1]
        if level == self.depth:
            stored = written["states"][:, 1]
        return self.from_tiles(stored[:, : self.tiles * TILE * self.padded_hidden]).double()

    def expected(self, dtype):
        """The output, the normalised states of all levels, and their 1 / rms, by PixNerd's form in plain PyTorch in a dtype."""

        def normal(h):
            wide = h.to(torch.promote_types(h.dtype, torch.float32))
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return ((wide * scale).to(dtype), scale[..., 0].double()) if self.residual else (h, None)

        shared = (self.embed, self.bias, self.gains, self.out_gain, self.out_weight, self.out_bias)
        embed, bias, gains, out_gain, out_weight, out_bias = (v.to(dtype) for v in shared)
        pixels = reference.to_patches(self.x.to(dtype), self.p)
        waves = self.waves(torch.float64).to(dtype).expand(self.patches, -1, -1)
        w1, w2 = (w.to(dtype) for w in self.split())
        h = torch.cat((pixels, waves), dim=2) @ embed.T + bias
        states, scales = [], []
        for level in range(self.depth):
            n, scale = normal(h)
            states.append(n.double())
            scales.append(scale)
            second = functional.normalize(w2[:, level], dim=1) if self.both else w2[:, level]
            entered = n * gains[level] if self.residual else n
            out = functional.silu(entered @ functional.normalize(w1[:, level], dim=1)) @ second
            h = h + out if self.residual else out
        n, scale = normal(h)
        states.append(n.double())
        scales.append(scale)
        out = (n * out_gain if self.residual else n) @ out_weight.T + out_bias
        return reference.from_patches(out, tuple(self.x.shape), self.p).double(), states, scales


def check(field, library):
    """Run the kernel in both of its forms, and compare everything it stores."""
    exact, plain = field.expected(torch.float64), field.expected(field.dtype)
    if field.first == 0:
        assert_near(field.run(library)["out"].double(), plain[0], exact[0], field.dtype)
    written = field.run(library, keep=True)
    for level in range(field.depth + 1):
        state = field.state(written, level)
        assert state.isfinite().all() and not state[..., field.hidden :].any()
        found = state[:, : field.pixels, : field.hidden]
        assert_near(found, plain[1][level][field.first :], exact[1][level][field.first :], field.dtype)
        if field.residual:
            scale = exact[2][level][field.first :]
            assert (written["inverse_rms"][:, level, : field.pixels] / scale - 1).abs().max() <= 4 * torch.finfo(
                field.dtype
            ).eps
    first, second = (v[field.first :] for v in field.inverse_lengths())
    lengths, padded = written["inverse_lengths"].double(), field.padded_inner
    second = second if field.both else torch.ones_like(second)
    for found, want in ((lengths[..., : field.inner], first), (lengths[..., padded : padded + field.hidden], second)):
        assert torch.allclose(found, want, rtol=torch.finfo(field.dtype).eps)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("both", [True, False], ids=["both", "first"])
@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_variants(library, dtype, hidden, ratio, both, residual):
    check(Field(dtype=dtype, hidden=hidden, ratio=ratio, both=both, residual=residual, depth=3, p=8), library)


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("hidden", [64, 96])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_depths(library, dtype, hidden, depth):
    check(Field(dtype=dtype, hidden=hidden, depth=depth, down=2), library)


# 1, 2, 3, 4, 7 and 16 tiles: 1, 1, 1, 1, 2 and 4 sets, with two halves 1, 1, 2, 2, 4 and 8.
@pytest.mark.many_forms(3)
@pytest.mark.parametrize("hidden", [32, 72])
@pytest.mark.parametrize("p", [1, 5, 8, 11, 12, 16, 20, 32])
def test_tiles(library, p, hidden):
    check(Field(p=p, hidden=hidden, batch=2, across=1, multiprocessors=3), library)


# Slices with two halves: 2, 4, 6 and 9 slices of 72, 2, 5, 8 and 12 of 96, 2, 6, 10 and 16 of 128.
@pytest.mark.many_forms(3)
@pytest.mark.parametrize("ratio", [1, 3, 5, 8])
@pytest.mark.parametrize("hidden", [8, 24, 40, 64, 72, 96, 128])
def test_sizes_of_the_weights(library, hidden, ratio):
    check(Field(hidden=hidden, ratio=ratio, p=9, dtype=FP16 if hidden in (40, 96) else BF16), library)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("hidden", [64, 72])
def test_channels_in_any_layout(library, hidden, channels, strided):
    check(Field(hidden=hidden, channels=channels, strided=strided, p=7, batch=2, down=2, across=2), library)


@pytest.mark.many_forms(5)
@pytest.mark.parametrize(("hidden", "ratio"), [(64, 2), (64, 4), (128, 1)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_zero_columns(library, dtype, hidden, ratio):
    check(Field(dtype=dtype, hidden=hidden, ratio=ratio, p=8, zero_columns=True), library)


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("scale", [1e-9, 1e9], ids=str)
def test_an_embedding_outside_the_range_of_fp16(library, scale, hidden):
    check(Field(scale=scale, hidden=hidden, p=9, eps=1e-30), library)


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("zero_table", [False, True], ids=["table", "no-table"])
def test_rows_beyond_the_patch_without_eps(library, zero_table, hidden):
    check(Field(hidden=hidden, p=5, eps=0.0, zero_table=zero_table), library)


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("p", [8, 12])
def test_a_round_repeats_bit_for_bit_on_any_number_of_blocks(library, p, hidden):
    runs = [
        Field(p=p, hidden=hidden, across=7, first=2, multiprocessors=multiprocessors).run(library, keep=True)
        for multiprocessors in (1, 1, 2, 5)
    ]
    for written in runs[1:]:
        assert all(torch.equal(v.view(torch.uint8), runs[0][name].view(torch.uint8)) for name, v in written.items())
    check(Field(p=p, hidden=hidden, across=7, first=2, depth=3, aliased=p == 8), library)


@pytest.mark.many_forms(3)
@pytest.mark.parametrize("keep", [False, True], ids=["output", "states"])
@pytest.mark.parametrize("fault", ["swizzle", "proxy_fence", "early_load", "transposed", "wait_group"])
@pytest.mark.parametrize("hidden", [64, 96])
def test_a_planted_fault_is_found(library, hidden, fault, keep):
    # More steps than stages on each block, and an odd number per item or level: it then ends with a step by itself.
    field = Field(hidden=hidden, depth=3, across=8, multiprocessors=1)
    good = field.run(library, keep)
    library.plant_fault(fault.encode())
    try:
        found = False
        for _ in range(8):  # blocks take eight orders of events in turn
            if found:
                break
            try:
                bad = field.run(library, keep)
                found |= any(
                    not torch.equal(v.view(torch.uint8), good[name].view(torch.uint8)) for name, v in bad.items()
                )
            except AssertionError:
                found = True
        assert found
    finally:
        library.plant_fault(b"")
