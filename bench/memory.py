"""Print the memory that PixNerd's decoder saves for backward and its peak memory, in eager PyTorch and in ours.

One image, forward and backward of the decoder from patch features to pixels. The columns:

saved               all tensors kept for backward except parameters, counted on meta tensors, so the numbers hold for any device
peak on this CPU    how far the resident memory of a new process rises above its level before the step; without the gradient of the
                    generators, which all entries need alike
peak by count       the most bytes that tensors of the field's forward and backward hold at once on a GPU in addition to the inputs;
                    for ours, the allocations of the Triton kernels' host code. A second column adds the generated weights, which
                    both sides need unless they are generated in chunks
"""

import argparse
import json
import subprocess
import sys
import unittest.mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flowseg_kernels as fk

from . import field_plain
from .machine import resident

#: PixNerd's width D and field blocks L.
MODELS = {"L": (1024, 2), "XL": (1152, 4)}
ENTRIES = ("eager", "ours", "ours, 64 patches at a time")
PATCH = 16
_PEAKS = "peak bf16 of the field by count for a GPU, MiB", "with its generated weights, MiB"


def case(entry: str, model: str, side: int, dtype: torch.dtype, device: str):
    """(decoder, forward, x, s) of one entry."""
    dim, depth = MODELS[model]
    chunk = 64 if "64" in entry else None
    with torch.device(device):
        decoder = fk.NeuralFieldDecoder(dim, depth=depth, patch_chunk=chunk).to(dtype)
        x = torch.ones(1, 3, side, side, dtype=dtype)
        s = torch.ones(1, (side // PATCH) ** 2, dim, dtype=dtype, requires_grad=True)
        dct = torch.zeros(1, PATCH**2, 64, dtype=dtype)
    if entry != "eager":
        return decoder, decoder, x, s

    def eager(x, s):
        weights = torch.stack([block.param_generator1(s) for block in decoder.blocks], dim=2)
        embed, last = decoder.x_embedder.embedder[0], decoder.final_layer
        norms = torch.stack([block.norm.weight for block in decoder.blocks])
        return field_plain.field(
            x, weights, embed.weight, embed.bias, norms, last.norm.weight, last.linear.weight, last.linear.bias, dct
        )

    return decoder, eager, x, s


def saved_bytes(entry: str, model: str, side: int, dtype: torch.dtype) -> int:
    decoder, forward, x, s = case(entry, model, side, dtype, "meta")
    parameters = {p.untyped_storage()._cdata for p in decoder.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(x, s)
    del out
    return sum(storage.nbytes() for storage in found.values())


class Allocated(TorchDispatchMode):
    """Tracks the most bytes that tensors created inside the block hold at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        for v in tree_leaves(made):
            storage = v.untyped_storage() if isinstance(v, torch.Tensor) else None
            if storage is not None and storage._cdata not in given:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


class _NoKernel:
    """Stands for a Triton kernel: a launch only appends the kernel's name to `noted`, if that is a list."""

    def __init__(self, name, noted):
        self.name, self.noted = name, noted

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        if self.noted is not None:
            self.noted.append(self.name)


def without_kernels(noted: list | None = None):
    """Replace the field's Triton kernels by stubs, so the host code runs on any tensors; `noted` collects the names of launches."""
    from flowseg_kernels.ops.neural_field import triton_launch

    names = [name for name in vars(triton_launch) if name.endswith("_kernel")]
    stubs = {name: _NoKernel(name, noted) for name in names}
    return unittest.mock.patch.multiple(triton_launch, **stubs)


def counted_peak_bytes(entry: str, model: str, side: int, dtype: torch.dtype) -> int:
    """Peak bytes of the field for "eager" or "ours", in addition to x and the generated weights."""
    from flowseg_kernels.ops.neural_field import triton_launch

    dct = torch.zeros(1, PATCH**2, 64, dtype=dtype, device="meta")
    made = field_plain.inputs(patches=1, depth=MODELS[model][1], dtype=dtype)
    x, weights, *shared = (v.detach().to("meta") for v in made)
    patches = (side // PATCH) ** 2
    inputs = [x.new_empty(1, 3, side, side), weights.new_empty(1, patches, *weights.shape[2:]), *shared]
    inputs = [v.requires_grad_() for v in inputs]
    with Allocated() as found:
        if entry == "eager":
            out = field_plain.field(*inputs, dct)
            torch.autograd.grad(out, inputs, torch.empty_like(out))
        else:
            with without_kernels(), torch.no_grad():
                options = PATCH, 2, 1e-6, "both", "residual"
                out = triton_launch.neural_field(*inputs, *options)
                triton_launch.neural_field_bwd(torch.empty_like(out), *inputs, *options, [True] * len(inputs))
    return found.peak


def generated_bytes(model: str, side: int, dtype: torch.dtype) -> int:
    """Bytes of the weights that the decoder generates for one image, all blocks."""
    return (side // PATCH) ** 2 * MODELS[model][1] * 2 * 2 * 64 * 64 * dtype.itemsize


def counted(entry: str, model: str, side: int) -> list[int | None]:
    """Counted bytes: saved in bf16, saved in fp32, GPU peak without the generated weights, GPU peak with them."""
    found: list[int | None] = [saved_bytes(entry, model, side, t) for t in (torch.bfloat16, torch.float32)]
    if "64" in entry:
        return [*found, None, None]
    peak = counted_peak_bytes(entry, model, side, torch.bfloat16)
    return [*found, peak, peak + generated_bytes(model, side, torch.bfloat16)]


def cells(row: list[int | None], eager: list[int]) -> list[str]:
    """Table cells in MiB, with the factor relative to eager."""
    return [
        "" if v is None else f"{v / 2**20:,.1f}" + (f" (1/{e / v:.1f})" if row is not eager else "")
        for v, e in zip(row, eager)
    ]


def peak_bytes(entry: str, model: str, side: int) -> int:
    decoder, forward, x, s = case(entry, model, side, torch.float32, "cpu")
    # Both sides would hold the same large gradient of the generators.
    for block in decoder.blocks:
        block.param_generator1.requires_grad_(False)
    p = PATCH
    forward(x[:, :, :p, : 2 * p].contiguous(), s[:, :2]).sum().backward()
    s.grad = None
    before = resident()["VmRSS"]
    forward(x, s).sum().backward()
    return resident()["VmHWM"] - before


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        entry, model, side = given.case
        print(json.dumps(peak_bytes(entry, model, int(side))))
        return
    heads = "one image", "", "saved bf16, MiB", "saved fp32, MiB", *_PEAKS, "peak fp32 of the decoder on this CPU, MiB"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for model in MODELS:
        for side in (256, 512):
            first = None
            for entry in ENTRIES:
                command = [sys.executable, "-m", "bench", "memory", "--case", entry, model, str(side)]
                peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                row = [*counted(entry, model, side), peak]
                first = first or row
                print(f"| {model} {side} x {side} | {entry} | {' | '.join(cells(row, first))} |", flush=True)
