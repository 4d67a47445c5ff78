"""Memory and operations of training, as counted on tensors without values."""

import pytest
import torch
import training_memory
import yaml
from launching import plain
from small_models import AUTOENCODER, UNET
from torch._subclasses.fake_tensor import FakeTensorMode

from brics_diffusers import BricsAutoencoder


def test_peak_is_of_what_is_alive_together():
    with FakeTensorMode(), training_memory.Cost() as memory:
        a = torch.zeros(1000)
        b = a + 1
        a.add_(1)  # in place, and a view: no new storage
        view = b.view(10, 100)
        del a
        c = view * 2
        del b, view, c
    assert (memory.peak, memory.now) == (8000, 0)


def autoencoder_step(config, batch_size, checkpointing):
    """Stage one without LPIPS and discriminator, whose sizes are not those of a small model."""
    autoencoder = BricsAutoencoder(**config["autoencoder"])
    if checkpointing:
        autoencoder.enable_gradient_checkpointing()
    autoencoder(torch.rand(batch_size, 3, 32, 32)).sample.square().mean().backward()


@pytest.mark.parametrize("stage", [autoencoder_step, training_memory.stage_two])
def test_memory_grows_with_the_batch_and_falls_with_checkpointing(stage):
    config = {"autoencoder": AUTOENCODER, "unet": UNET}
    cases = ((1, False), (16, True), (16, False))
    costs = [training_memory.two_steps_cost(stage, config, *case) for case in cases]
    small, saving, large = (cost.peak for cost in costs)
    assert small < saving < large < 16 * small  # weights and Adam's moments don't grow
    small, saving, large = (cost.operations for cost in costs)
    assert small < large < saving  # the forward pass twice


def test_operations_are_those_of_products_and_convolutions():
    with FakeTensorMode(), training_memory.Cost() as cost:
        weight = torch.zeros(5, 4, requires_grad=True)
        (torch.zeros(3, 5) @ weight).sum().backward()  # the gradient of the weight is one product more
        torch.nn.functional.conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), padding=1)
    assert cost.operations == 2 * (2 * 3 * 5 * 4) + 2 * (2 * 8 * 8 * 4 * 3 * 3 * 3)


def test_tables(monkeypatch, tmp_path, capsys):
    flags = {"train_batch_size": 2, "max_train_steps": 3600}
    config = {"train_key_codes": flags, "autoencoder": plain(AUTOENCODER), "unet": plain(UNET)}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(training_memory, "CONFIGS", tmp_path)
    monkeypatch.setattr(training_memory, "STAGES", {training_memory.stage_two: ("stage two", "train_key_codes")})
    training_memory.print_memory(["small"], {training_memory.stage_two: [2]}, "cpu")
    text = capsys.readouterr().out
    peaks = [training_memory.two_steps_cost(training_memory.stage_two, config, 2, flag).peak for flag in (False, True)]
    assert (
        text.startswith("Computed peak memory")
        and "| small | {:.1f} ({:.1f}) |".format(*(peak / 2**30 for peak in peaks)) in text
    )
    training_memory.print_hours(["small"], teraflops=1e-6)
    hours = float(capsys.readouterr().out.split("|")[-2])
    operations = training_memory.two_steps_cost(training_memory.stage_two, config, 2).operations / 2
    assert hours == pytest.approx(operations * 3600 / 1e6 / 3600, rel=0.05) and hours > 0


@pytest.mark.slow
def test_stage_one_of_a_preset():
    config = yaml.safe_load((training_memory.CONFIGS / "own-images-64.yaml").read_text())
    cost = training_memory.two_steps_cost(training_memory.stage_one, config, 1)
    assert cost.peak > 0 and cost.operations > 0
