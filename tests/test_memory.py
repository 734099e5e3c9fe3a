"""bench/memory.py counts bytes on meta tensors: the field saves only its inputs, and needs a sixth of the memory of PixNerd."""

import pytest
import torch

from bench import memory

from .native import ROOT


@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("model", memory.MODELS)
def test_saved_memory_is_that_of_the_inputs_and_a_sixth_of_eager(model, side):
    eager, ours, chunked = (memory.saved_bytes(entry, model, side, torch.bfloat16) for entry in memory.ENTRIES)
    dim, depth = memory.MODELS[model]
    patches = (side // memory.PATCH) ** 2
    inputs = 2 * (3 * side**2 + patches * (dim + depth * 2 * 2 * 64 * 64))
    # The second bound leaves room for the few weights that all patches share.
    assert inputs <= ours <= inputs + 2**16
    assert 6 * ours <= eager
    assert chunked <= ours - 2 * patches * depth * 2 * 2 * 64 * 64 + 2**16


@pytest.mark.parametrize("side", [256, 512, 1024])
@pytest.mark.parametrize("model", memory.MODELS)
def test_peak_by_count_is_a_sixth_of_eager(model, side):
    pytest.importorskip("triton", reason="the GPU kernels' host code needs Triton")
    eager, ours = (memory.counted_peak_bytes(entry, model, side, torch.bfloat16) for entry in memory.ENTRIES[:2])
    assert 6 * ours <= eager


def test_the_notes_contain_the_counted_numbers():
    pytest.importorskip("triton", reason="the GPU kernels' host code needs Triton")
    notes = (ROOT / "docs" / "notes" / "static_counts.md").read_text()
    for model in memory.MODELS:
        for side in (256, 512):
            eager = memory.counted("eager", model, side)
            for entry in memory.ENTRIES:
                row = eager if entry == "eager" else memory.counted(entry, model, side)
                assert f"| {model} {side} x {side} | {entry} | {' | '.join(memory.cells(row, eager))} | " in notes


def test_the_count_frees_a_storage_with_its_last_view():
    with memory.Allocated() as found:
        a = torch.empty(1000, dtype=torch.uint8, device="meta")
        b = a.view(10, 100)
        del a
        c = torch.empty(500, dtype=torch.uint8, device="meta")
        del b, c
        torch.empty(700, dtype=torch.uint8, device="meta")
    assert found.peak == 1500
