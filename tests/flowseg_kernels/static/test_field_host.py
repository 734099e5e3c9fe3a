"""Launches and calls of PyTorch per call of the field. field_host.py prints them with their times."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import torch

from flowseg_kernels.ops.neural_field import triton_settings

from . import field_host


@pytest.mark.parametrize("depth", field_host.DEPTHS.values())
def test_launches_and_calls_of_pytorch_do_not_grow_up_to_4096_patches(depth):
    """Beyond 4,096 patches each further round of the backward adds three launches."""
    small, large, larger = (field_host.arguments(depth, patches) for patches in (256, 4096, 16384))
    forward = field_host.calls(field_host.forward, small)
    assert forward == field_host.calls(field_host.forward, larger)
    assert forward.launches == ["table_kernel", "forward_kernel"] and len(forward.torch) <= 3
    backward = field_host.calls(field_host.backward, small)
    assert backward == field_host.calls(field_host.backward, large)
    one = ["forward_kernel", "backward_kernel", "enter_kernel"]
    assert backward.launches == ["table_kernel", *one, "finish_kernel"]
    assert len(backward.torch) <= 19 and "aten.zero_.default" not in backward.torch
    rounds = field_host.calls(field_host.backward, larger)
    assert rounds.launches == ["table_kernel", *one * 4, "finish_kernel"] and rounds.torch == backward.torch


@pytest.mark.parametrize("depth", field_host.DEPTHS.values())
def test_the_decoder_calls_little_of_pytorch_around_the_op(depth):
    """Each block has a generator and its gradients; all else is a few calls."""
    forward, backward = field_host.Layer(depth).calls()
    assert forward.count("flowseg.neural_field.default") == backward.count("flowseg.neural_field_bwd.default") == 1
    assert len(forward) <= 5 * depth + 3 and len(backward) <= 16 * depth + 6


def test_settings_of_a_launch_are_computed_once():
    tensors = field_host.arguments(2, 256, torch.float32)
    with torch.no_grad(), field_host.without_kernels():
        field_host.forward(tensors)
        field_host.backward(tensors)
        found = triton_settings.launch_of.cache_info().misses
        field_host.forward(tensors)
        field_host.backward(tensors)
    assert triton_settings.launch_of.cache_info().misses == found
