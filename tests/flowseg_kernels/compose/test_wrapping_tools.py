"""Tools that wrap the decoder's layers: accelerate's offload and casting, PEFT, FSDP2, and checkpointing of blocks."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook

from .steps import called
from .test_wrapped_layers import LAYERS, algebra, build, compare, replaced, two_steps

OFFLOADS = {
    "cpu_offload": lambda d, module, folder: module.cpu_offload(d, execution_device=torch.device("cpu")),
    "disk_offload": lambda d, module, folder: module.disk_offload(d, folder, execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("way", OFFLOADS)
def test_offloaded_weights_give_the_same_bits(way, patch_chunk, tmp_path, monkeypatch):
    """The fused op gets the weights that accelerate loads for the call."""
    accelerate = pytest.importorskip("accelerate")
    decoder, x, s = build(patch_chunk=patch_chunk)
    with torch.no_grad():
        want = decoder(x, s)
        moved = OFFLOADS[way](decoder, accelerate, str(tmp_path))
        calls = called(monkeypatch, ["neural_field"])
        assert torch.equal(moved(x, s), want) and torch.equal(moved(x, s), want)
    assert len(calls) == 2 * (1 if patch_chunk is None else 4)
    assert all(p.is_meta for p in moved.parameters())


def test_a_dispatched_decoder_gives_the_same_numbers(patch_chunk):
    """dispatch_model also hooks the modules that contain layers. So the decoder calls the layers."""
    accelerate = pytest.importorskip("accelerate")
    decoder, x, s = build(patch_chunk=patch_chunk)
    with torch.no_grad():
        want = decoder(x, s)
        moved = accelerate.dispatch_model(decoder, {"": "cpu"}, main_device="cpu", force_hooks=True)
        torch.testing.assert_close(moved(x, s), want, rtol=1e-4, atol=1e-5)


def test_a_users_hook_on_an_offloaded_layer_runs(patch_chunk):
    accelerate = pytest.importorskip("accelerate")
    decoder, x, s = build(patch_chunk=patch_chunk)
    with torch.no_grad():
        want = decoder(x, s)
        moved = accelerate.cpu_offload(decoder, execution_device=torch.device("cpu"))
        moved.final_layer.linear.register_forward_hook(lambda m, args, out: out + 1)
        torch.testing.assert_close(moved(x, s), want + 1, rtol=1e-4, atol=1e-5)


def test_layerwise_casting_stores_in_bf16_and_computes_in_fp32(patch_chunk):
    modeling = pytest.importorskip("accelerate.big_modeling")
    decoder, x, s = build(patch_chunk=patch_chunk)
    want = copy.deepcopy(decoder).bfloat16().float()(x, s)
    modeling.attach_layerwise_casting_hooks(
        decoder, storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=()
    )
    assert {p.dtype for m in decoder.modules() if isinstance(m, nn.Linear) for p in m.parameters()} == {torch.bfloat16}
    got = decoder(x, s)
    assert got.dtype == torch.float32
    # The tool does not cast norms, but `want` has their gains in bf16.
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", ["generator", "embedder", "last", "all"])
def test_lora_of_peft_trains_and_merges(layer, patch_chunk):
    peft = pytest.importorskip("peft")
    targets = r".*(param_generator1|embedder\.0|linear)" if layer == "all" else rf".*{LAYERS[layer]}"
    found = []
    for chunk in (patch_chunk, None):
        decoder, x, s = build(patch_chunk=chunk)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
        model = peft.get_peft_model(decoder, config)
        forward = model if not found else lambda x, s, model=model: algebra(model.base_model.model, x, s)
        found.append(two_steps(forward, model, x, s))
        assert found[-1][1] and all("lora_" in name for name in found[-1][1])
        if len(found) == 1:
            want = model(x, s)
            torch.testing.assert_close(model.merge_and_unload()(x, s), want, rtol=1e-3, atol=1e-4)
            decoder, x, s = build(patch_chunk=chunk)
    compare(*found)


def test_a_checkpointed_block_generates_its_weights_again(patch_chunk, monkeypatch):
    decoder, x, s = build(patch_chunk=patch_chunk)
    want = two_steps(decoder, decoder, x, s)
    decoder, x, s = build(patch_chunk=patch_chunk)
    for path in ("blocks.0", "blocks.1"):
        replaced(checkpoint_wrapper)(decoder, path)
    ran = []
    decoder.blocks[0].param_generator1.register_forward_pre_hook(lambda m, args: ran.append(1))
    calls = called(monkeypatch, ["neural_field"])
    decoder(x, s).square().mean().backward()
    # Chunks nest a checkpoint in a checkpoint, and the generator may run more often.
    assert len(ran) >= (2 if patch_chunk is None else 8) and calls
    decoder.zero_grad()
    got = two_steps(decoder, decoder, x, s)
    compare((got[0], {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in got[1].items()}), want)


@pytest.fixture
def one_process():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", ["linear", "layers", "blocks", "hooked"])
def test_sharded_layers_give_the_same_bits(one_process, sharded, patch_chunk, monkeypatch):
    """FSDP2 on each layer or block: the fused op gets the weights that a call gathers. With a user's hook the layers are called."""
    from torch.distributed.fsdp import fully_shard

    decoder, x, s = build(patch_chunk=patch_chunk)
    want = torch.autograd.grad(decoder(x, s).square().mean(), list(decoder.parameters()))
    out = decoder(x, s)
    kinds = (nn.Linear,) if sharded == "linear" else (nn.Linear, nn.RMSNorm)
    parts = list(decoder.blocks) if sharded == "blocks" else [m for m in decoder.modules() if isinstance(m, kinds)]
    for part in parts:
        fully_shard(part, mesh=one_process)
    if sharded == "hooked":
        decoder.final_layer.linear.register_forward_hook(lambda m, args, out: out * 1)
    fully_shard(decoder, mesh=one_process)
    calls = called(monkeypatch, ["neural_field"])
    got = decoder(x, s)
    assert bool(calls) == (sharded != "hooked")
    if sharded == "hooked":
        torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(got, out)
    got.square().mean().backward()
    for (name, p), g in zip(decoder.named_parameters(), want):
        torch.testing.assert_close(p.grad.full_tensor(), g, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_mixed_precision_of_a_sharded_layer_is_kept(one_process, patch_chunk):
    """A call gathers weights in the policy's dtype; gradients have the parameter's dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    decoder, x, s = build(patch_chunk=patch_chunk)
    want = copy.deepcopy(decoder).bfloat16()(x, s.bfloat16())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in [m for m in decoder.modules() if isinstance(m, (nn.Linear, nn.RMSNorm))]:
        fully_shard(part, mesh=one_process, mp_policy=policy)
    fully_shard(decoder, mesh=one_process)
    got = decoder(x, s)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    got.square().mean().backward()
    assert {p.grad.dtype for p in decoder.parameters()} == {torch.float32}


def test_a_replicated_weight_is_used_by_its_layer(one_process, patch_chunk):
    """A DTensor weight outside of FSDP, as in tensor parallelism: the layer's hooks convert its output to a tensor."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    decoder, x, s = build(patch_chunk=patch_chunk)
    want = decoder(x, s)
    parallelize_module(
        decoder, one_process, dict.fromkeys(("x_embedder.embedder.0", "final_layer.linear"), ColwiseParallel())
    )
    torch.testing.assert_close(decoder(x, s), want, rtol=1e-4, atol=1e-5)


def test_a_hook_on_all_modules_sees_every_layer(patch_chunk):
    decoder, x, s = build(patch_chunk=patch_chunk)
    want = decoder(x, s)
    seen = set()
    handle = register_module_forward_hook(lambda m, args, out: seen.add(m))
    try:
        got = decoder(x, s)
    finally:
        handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaves = {m for m in decoder.modules() if not list(m.children())}
    assert leaves < seen and len(leaves) == 7
