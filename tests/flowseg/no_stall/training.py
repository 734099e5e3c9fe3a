"""The Trainer's own step: no read-back outside of logging, and the numbers of a run on the CPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flowseg.training.trainer as training
from flowseg.training.ema import Ema
from tests.flowseg.tiny import TINY_MODEL, tiny_config
from tests.support.pretend_device import WAITS, no_read_back, recorded


def config_of(**sections):
    train = {"log_every": 1000, "steps": 1000, "batch_size": 2, "accumulation": 2, **sections.pop("train", {})}
    model = {**TINY_MODEL, "depth": 1, **sections.pop("model", {})}
    return tiny_config(train=train, model=model, optim={"lr": 1e-3}, **sections)


CASES = {
    "image source, velocity": {
        "codes": {"channels": 8},
        "flow": {"predicts": "velocity", "time_sampler": "logit_normal"},
    },
    "noise source, end point": {
        "flow": {"source": "noise", "predicts": "endpoint"},
        "model": {"activation_checkpointing": True, "field_chunk": 2},
    },
    "cross-entropy": {
        "loss": {"kind": "cross_entropy"},
        "codes": {"sequence": "one_hot", "channels": 11},
        "flow": {"zero_fraction": 1.0},
    },
}


def steps_without_read_backs(trainer, count=2):
    """The weights after a first step, which may read to fill caches of codes and positions, and ``count`` that may not."""
    assert trainer.train_step(trainer.config)
    with no_read_back():
        for _ in range(count):
            assert trainer.train_step(trainer.config)
    found = {name: value.detach().cpu() for name, value in trainer.bare_model.named_parameters()}
    return found | {f"ema.{name}": value.cpu() for name, value in trainer.ema.tensors.items()}


def check_steps(device, trainer_on, config, tolerance=0.0):
    """Steps do not read, and the weights that they leave are those of a run on the CPU."""
    # Only the attention that torch composes itself runs on every device.
    with sdpa_kernel(SDPBackend.MATH):
        found = steps_without_read_backs(trainer_on(device, config))
        if device.type != "cuda":
            expected = steps_without_read_backs(trainer_on(torch.device("cpu"), config))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_steps_do_not_read(device, trainer_on, name):
    check_steps(device, trainer_on, config_of(**CASES[name]))


def test_steps_in_bf16_do_not_read(device, trainer_on):
    # Autocast on a CPU keeps attention in float32, so that rounding differs.
    config = config_of(train={"mixed_precision": "bf16"}, flow={"source": "noise"})
    check_steps(device, trainer_on, config, tolerance=2e-2)


def test_steps_with_repa_and_a_stem_do_not_read(device, trainer_on, encoder_folder):
    repa = {"weight": 0.5, "encoder": str(encoder_folder), "block": 1}
    config = config_of(repa=repa, flow={"source": "noise"}, model={"stem_width": 8})
    # GroupNorm adds channels-last images on a CPU in another order than on other devices.
    check_steps(device, trainer_on, config, tolerance=1e-3)


def test_a_logged_step_reads_once_and_so_does_the_check_of_a_checkpoint(device, trainer_on):
    if device.type == "cuda":
        pytest.skip("only the pretended device counts read-backs; torch.cuda.set_sync_debug_mode raises or warns")
    trainer = trainer_on(device, config_of(train={"log_every": 2}))
    logged = []
    trainer.log = lambda **fields: logged.append(fields)
    steps_without_read_backs(trainer, count=0)
    with recorded() as reads:
        trainer.train_step(trainer.config)
        assert len(reads) == 1 and "_log_step" in reads[0], reads
        trainer._check_finite(*trainer.bare_model.parameters())
        assert len(reads) == 2 and "_check_finite" in reads[1], reads
    assert logged[0]["loss"] > 0 and logged[0]["grad_norm"] > 0


def test_a_loss_that_is_not_finite_still_ends_the_run(device, trainer_on):
    trainer = trainer_on(device, config_of(train={"log_every": 1}))
    with torch.no_grad():
        trainer.bare_model.patch_embed.proj.weight.fill_(torch.inf)
    with pytest.raises(training.UserError, match="the loss is no longer finite at step 1"):
        trainer.train_step(trainer.config)


def plant_item(trainer, monkeypatch):
    update = Ema.update
    monkeypatch.setattr(
        Ema, "update", lambda *args: (update(*args), args[0].tensors["patch_embed.proj.bias"][0].item())
    )


def plant_bool(trainer, monkeypatch):
    def step(*args):
        found = flow_step(*args)
        if found.flow > 1e9:
            raise AssertionError
        return found

    flow_step = training.flow_step
    monkeypatch.setattr(training, "flow_step", step)


def plant_cpu(trainer, monkeypatch):
    clip = trainer.accelerator.clip_grad_norm_
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *args: clip(*args).cpu())


def plant_numbers_from_the_host(trainer, monkeypatch):
    backward = trainer.accelerator.backward
    monkeypatch.setattr(
        trainer.accelerator, "backward", lambda loss: backward(loss * torch.tensor([1.0], device=loss.device).sum())
    )


def plant_blocking_copy(trainer, monkeypatch):
    flow_step = training.flow_step
    device = trainer.device
    monkeypatch.setattr(training, "flow_step", lambda *args: (torch.rand(2, 3).to(device), flow_step(*args))[1])


def plant_mask(trainer, monkeypatch):
    update = Ema.update

    def masked(ema, *args):
        update(ema, *args)
        value = ema.tensors["patch_embed.proj.bias"]
        value[value > 1e9] = 0.0 * value[:1].sum()

    monkeypatch.setattr(Ema, "update", masked)


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.isfinite().all() else None


def plant_in_backward(trainer, monkeypatch):
    backward = trainer.accelerator.backward
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: backward(_Reads.apply(loss)))


PLANTS = (
    plant_item, plant_bool, plant_cpu, plant_numbers_from_the_host, plant_blocking_copy, plant_mask, plant_in_backward,
)  # fmt: skip


@pytest.fixture(scope="module")
def used_trainer(device, trainer_on):
    """A Trainer whose steps do not read."""
    trainer = trainer_on(device, config_of())
    steps_without_read_backs(trainer, count=1)
    return trainer


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_read_back_fails_and_is_named(device, used_trainer, monkeypatch, plant):
    plant(used_trainer, monkeypatch)
    with no_read_back(), pytest.raises(RuntimeError, match=WAITS) as caught:
        used_trainer.train_step(used_trainer.config)
    if device.type != "cuda":
        assert "tests/flowseg/no_stall/training.py" in str(caught.value)


def test_batches_that_are_not_pinned_fail(device, used_trainer, monkeypatch):
    if device.type == "cuda":
        pytest.skip("torch.cuda.set_sync_debug_mode does not see copies from memory that is not pinned")
    monkeypatch.setattr("tests.support.pretend_device._is_pinned", lambda tensor: False)
    with no_read_back(), pytest.raises(RuntimeError, match="host memory that is not pinned"):
        used_trainer.train_step(used_trainer.config)
