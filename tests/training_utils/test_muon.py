"""Muon for the weights of layers, with Adam for all else."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from small_models import AUTOENCODER, UNET

from brics_diffusers import BricsAutoencoder
from brics_diffusers.training_utils.optimization import build_optimizer


RATES = {"encoder": 1e-3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BricsAutoencoder(**AUTOENCODER).train()


def build(model, **options):
    return build_optimizer(
        model, 4e-3, 0.9, 0.99, 1e-15, **{"part_learning_rates": RATES, "optimizer": "muon"} | options
    )


def take_steps(optimizer, model, count: int) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for _ in range(count):
        optimizer.zero_grad()
        torch.manual_seed(0)
        (model(images).sample - images).square().mean().backward()
        optimizer.step()


def states(model) -> dict:
    return copy.deepcopy(model.state_dict())


def assert_same(first: dict, second: dict) -> None:
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_layers_by_muon(model, monkeypatch):
    """As PyTorch's own Muon, if that works in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    before = states(model)
    optimizer, gradients = build(model), []
    for _ in range(3):
        take_steps(optimizer, model, 1)
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, rate, pick in (
        ("encoder.conv_in.weight", 1e-3, lambda weight: weight.flatten(1)),
        ("encoder.shortcut.weight", 1e-3, lambda weight: weight.flatten(1)),
        ("mlp.layers.0.weight", 4e-3, lambda weight: weight[1]),
        ("decoder.blocks.0.to_rgb.weight", 4e-3, lambda weight: weight.flatten(1)),
    ):
        alone = torch.nn.Parameter(pick(before[name]).clone())
        muon = torch.optim.Muon([alone], rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for of_step in gradients:
            alone.grad = pick(of_step[name])
            muon.step()
        torch.testing.assert_close(pick(model.get_parameter(name)), alone, rtol=0, atol=1e-3 * rate)
        assert not torch.allclose(alone, pick(before[name]), rtol=0, atol=0.3 * rate)


def test_all_else_by_adam(model):
    others = [name for name, value in model.named_parameters() if not name.endswith("weight") or value.ndim == 1]
    assert "grids.entries" in others and any("norm" in name for name in others) and "encoder.conv_in.bias" in others
    before = states(model)
    take_steps(build(model), model, 1)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    twin = BricsAutoencoder(**AUTOENCODER)
    twin.load_state_dict(before)
    for name, value in twin.named_parameters():
        value.grad = gradients[name]
    build(twin, optimizer="adam").step()
    for name in others:
        assert torch.equal(twin.get_parameter(name), model.get_parameter(name))
    moved = (model.grids.entries - before["grids.entries"]).abs().max().item()
    assert moved == pytest.approx(4e-3, rel=1e-3)


def test_every_trained_parameter_is_in_one_of_both(model):
    model.encoder.requires_grad_(False)
    optimizer = build(model)
    before = states(model)
    take_steps(optimizer, model, 2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.partition(".")[0] for name in moved} == {"grids", "mlp", "decoder"}


def test_embeddings_of_classes_are_no_layers():
    unet = UNet2DModel(**UNET | {"num_class_embeds": 3})
    *_, layers = build_optimizer(unet, 1e-3, 0.9, 0.99, 1e-8, optimizer="muon").param_groups
    chosen = [name for name, value in unet.named_parameters() if any(value is layer for layer in layers["params"])]
    assert layers["muon"] and {"conv_in.weight", "time_embedding.linear_1.weight"} <= set(chosen)
    assert "class_embedding.weight" not in chosen and all(name.endswith("weight") for name in chosen)
    assert not any("norm" in name for name in chosen)


def test_a_resumed_run_ends_with_the_same_bits(model):
    optimizer = build(model)
    take_steps(optimizer, model, 1)
    for group in optimizer.param_groups:  # as schedules do
        group["lr"] *= 0.5
        group["betas"], group["eps"] = (0.0, 0.99), 1e-8
    take_steps(optimizer, model, 1)
    twin = copy.deepcopy(model)
    resumed = build(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, own in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert all(group[name] == own[name] for name in ("lr", "betas", "eps"))
    take_steps(optimizer, model, 2)
    take_steps(resumed, twin, 2)
    assert_same(states(model), states(twin))


def test_learning_rates_are_those_of_the_groups(model):
    optimizer = build(model)
    take_steps(optimizer, model, 1)
    before = states(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(optimizer, model, 1)
    assert_same(before, states(model))


def test_a_closure(model):
    twin, images = copy.deepcopy(model), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer, other = build(model), build(twin)
    take_steps(optimizer, model, 1)

    def closure():
        torch.manual_seed(0)
        loss = (twin(images).sample - images).square().mean()
        loss.backward()
        return loss

    assert other.step(closure).item() > 0
    assert_same(states(model), states(twin))


def test_weights_may_move_after_the_optimizer_was_built(model):
    twin = copy.deepcopy(model)
    optimizer, others = build(model), build(twin)
    for parameter in model.parameters():  # as `Module.to` does
        parameter.data = parameter.data.clone()
    take_steps(optimizer, model, 2)
    take_steps(others, twin, 2)
    assert_same(states(model), states(twin))


def test_states_of_other_optimizers_are_refused(model):
    muon, adam = build(model), build(model, optimizer="adam")
    for optimizer in (muon, adam):
        take_steps(optimizer, model, 1)
    others = adam, build(model, part_learning_rates={}), build(model, optimizer="adam", part_learning_rates={})
    for other in others:
        with pytest.raises(ValueError, match="different number of parameter groups"):
            muon.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        adam.load_state_dict(muon.state_dict())


def test_scaled_losses_step_alike(model):
    """As in half precision: the scale is taken off before Muon and Adam see the gradients."""
    twin = copy.deepcopy(model)
    optimizer, other = build(model), build(twin)
    take_steps(optimizer, model, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    scaler.scale((twin(images).sample - images).square().mean()).backward()
    scaler.step(other)
    assert_same(states(model), states(twin))
    scaler.update()
    before = states(twin)
    twin.encoder.conv_in.weight.grad[0] = torch.inf
    scaler.step(other)
    assert_same(before, states(twin))
