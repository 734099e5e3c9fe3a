"""The layout of states and scratch of the neural field's CUDA kernels (csrc/cuda/field/params.h), and their bound of error."""

import functools

import torch

BF16, FP16 = torch.bfloat16, torch.float16
NAN = float("nan")
TILE, SLICE = 64, 128


@functools.cache
def places():
    """The place in a tile of its elements, row by row."""
    row, column = torch.arange(TILE)[:, None], torch.arange(TILE)
    return (row * TILE + ((column // 8) ^ (row % 8)) * 8 + column % 8).flatten()


class PaddedSizes:
    """Sizes that follow from hidden, ratio and p. Subclasses have these, and call `pad`."""

    def pad(self):
        self.inner, self.pixels = self.ratio * self.hidden, self.p**2
        self.tiles, self.halves = -(-self.pixels // TILE), -(-self.hidden // TILE)
        slice_units = SLICE // self.halves
        self.slices = -(-self.inner // slice_units)
        self.padded_inner, self.padded_hidden = self.slices * slice_units, self.halves * TILE

    def to_tiles(self, state, beyond):
        """A state in tiles. Rows beyond the patch hold `beyond`, columns beyond the hidden units zero."""
        padded = torch.zeros(self.tiles * TILE, self.padded_hidden, dtype=state.dtype)
        padded[:, : self.hidden] = beyond
        padded[: self.pixels, : self.hidden] = state
        found = torch.empty(self.tiles, self.halves, TILE**2, dtype=state.dtype)
        found[..., places()] = padded.view(self.tiles, TILE, self.halves, TILE).transpose(1, 2).flatten(2)
        return found.flatten()

    def from_tiles(self, flat):
        """States from their tiles: (patches, rows of whole tiles, whole halves)."""
        tiles = flat.reshape(-1, self.tiles, self.halves, TILE**2)[..., places()]
        rows = tiles.unflatten(-1, (TILE, TILE)).transpose(2, 3)
        return rows.reshape(-1, self.tiles * TILE, self.padded_hidden)


def assert_near(found, plain, exact, dtype, what=""):
    """The error is at most twice plain PyTorch's, which is not finite in fp16 next to a zero column."""
    allowed = 2 * (plain - exact).norm() if plain.isfinite().all() else torch.finfo(dtype).eps * exact.norm()
    assert (found - exact).norm() <= allowed, what
