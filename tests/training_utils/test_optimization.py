"""Adam with learning rates of a model's parts."""

import pytest
import torch
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder
from brics_diffusers.training_utils.optimization import build_optimizer


PARTS = {"encoder": 1e-3, "decoder": 3e-3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BricsAutoencoder(**AUTOENCODER)


def build(model, **options):
    return build_optimizer(model, 2e-3, 0.9, 0.99, 1e-15, **options)


def names(model, optimizer) -> list[list[str]]:
    """Names of the parameters of every group."""
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def test_without_parts_there_is_one_group(model):
    for options in ({}, {"part_learning_rates": {}}):
        optimizer = build(model, **options)
        assert names(model, optimizer) == [[name for name, _ in model.named_parameters()]]
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.9, 0.99), 1e-15)


@pytest.mark.parametrize("parts", [PARTS, dict(reversed(PARTS.items()))])
def test_groups_come_in_the_order_given_after_what_has_no_rate(model, parts):
    optimizer = build(model, part_learning_rates=parts)
    rest, *of_parts = names(model, optimizer)
    assert {name.partition(".")[0] for name in rest} == {"grids", "mlp"}
    for part, found in zip(parts, of_parts, strict=True):
        assert found == [f"{part}.{name}" for name, _ in getattr(model, part).named_parameters()]
    assert sorted(sum([rest, *of_parts], [])) == sorted(name for name, _ in model.named_parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, *parts.values()]
    assert all((group["betas"], group["eps"]) == ((0.9, 0.99), 1e-15) for group in optimizer.param_groups)


def test_a_rate_of_zero_is_none_at_all(model):
    optimizer = build(model, part_learning_rates={"encoder": 1e-3, "grids": 0.0})
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3, 0.0]
    assert len(names(model, optimizer)[1]) > 0


def test_frozen_parameters_are_left_out_and_their_group_stays(model):
    model.encoder.requires_grad_(False)
    optimizer = build(model, part_learning_rates=PARTS)
    rest, encoder, decoder = names(model, optimizer)
    assert encoder == [] and rest and decoder
    model(torch.zeros(1, 3, 32, 32)).sample.square().mean().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    moved = {name.partition(".")[0] for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {"grids", "mlp", "decoder"}
    # A checkpoint's state fits whatever the rates are.
    build(model, part_learning_rates={"encoder": 1.0, "decoder": 1.0}).load_state_dict(optimizer.state_dict())


def test_a_step_moves_each_part_by_its_rate(model):
    rates = {"encoder": 1e-3, "grids": 4e-3, "decoder": 8e-3}
    optimizer = build(model, part_learning_rates=rates)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        # Adam's first step is the rate, whatever the gradient; weights of up to 4 round to 2.4e-7 of float32.
        moved = before[name] - parameter.detach()
        expected = torch.full_like(moved, rates.get(name.partition(".")[0], 2e-3))
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_part_is_named(model):
    with pytest.raises(ValueError, match="names encodr; the model's parts are encoder, grids, mlp, decoder"):
        build(model, part_learning_rates={"encodr": 1e-3})
