"""Averages of weights whose length is chosen after the training."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from brics_diffusers.training_utils.checkpoints import RunState
from brics_diffusers.training_utils.post_hoc_ema import (
    SNAPSHOTS,
    PowerEMA,
    combine_profiles,
    load_average,
    power_exponent,
    profile_products,
    snapshot_files,
)


STEPS = 400


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def weights_at(step: int) -> torch.Tensor:
    """A smooth way from noise to an end, and one weight that never changes."""
    phase = torch.linspace(0, 6, 7)
    return torch.cat([torch.cos(phase + step / 60) + 3 * phase * math.exp(-step / 100), torch.tensor([1.0])])


def train(model, power_ema, steps: range, last: int = STEPS) -> None:
    for step in steps:
        model.weight.data[0] = weights_at(step)
        power_ema.step(RunState({}, global_step=step), last=step == last)


@pytest.fixture
def trained(accelerator, tmp_path):
    model = torch.nn.Linear(8, 1, bias=False)
    power_ema = PowerEMA(accelerator, model, tmp_path, every=30)
    train(model, power_ema, range(1, STEPS + 1))
    return model, power_ema, tmp_path / SNAPSHOTS


def plain_average(length: float, steps: int = STEPS) -> torch.Tensor:
    """By its definition, one step after another."""
    mean, exponent = torch.zeros(8, dtype=torch.float64), power_exponent(length)
    for step in range(1, steps + 1):
        kept = (1 - 1 / step) ** (exponent + 1)
        mean = kept * mean + (1 - kept) * weights_at(step).double()
    return mean


def test_exponents_have_their_lengths():
    assert power_exponent(0.1) == pytest.approx(6.937, abs=1e-3)
    assert power_exponent(0.05) == pytest.approx(16.97, abs=1e-2)
    steps = np.linspace(0, 1, 200_001)
    for length in (0.01, 0.1, 0.28):  # the standard deviation of a step with the density of the profile
        density = steps ** power_exponent(length)
        density /= density.sum()
        mean = (density * steps).sum()
        assert (density * (steps - mean) ** 2).sum() ** 0.5 == pytest.approx(length, rel=1e-3)


def test_products_are_integrals():
    profiles = np.array([(3.0, 0.5), (2.0, 17.0), (3.0, 7.0)])
    steps = (np.arange(300_000) + 0.5) / 100_000
    densities = [np.where(steps < t, (g + 1) * steps**g / t ** (g + 1), 0) for t, g in profiles]
    expected = [[(a * b).sum() / 100_000 for b in densities] for a in densities]
    np.testing.assert_allclose(profile_products(profiles, profiles), expected, rtol=1e-4)


def test_what_is_kept_is_the_definition(trained):
    _, power_ema, folder = trained
    for length, average in power_ema.averages.items():
        torch.testing.assert_close(average["weight"][0].double(), plain_average(length), rtol=1e-5, atol=1e-5)
    assert [int(path.stem) for path in snapshot_files(folder)] == [*range(30, STEPS, 30), STEPS]


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_kept_lengths_are_met_exactly(trained, length):
    model, power_ema, folder = trained
    assert load_average(model, folder, length) < 1e-6
    torch.testing.assert_close(model.weight.data, power_ema.averages[length]["weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [0.03, 0.075, 0.15, 0.2])
def test_other_lengths_are_nearly_met(trained, length):
    model, power_ema, folder = trained
    assert 1e-4 < load_average(model, folder, length) < 0.06
    expected, found = plain_average(length), model.weight.data[0].double()
    assert found[-1] == pytest.approx(1, abs=1e-6)  # what never changes stays
    error = (found - expected).abs().max()
    kept = [(average["weight"][0] - expected).abs().max() for average in power_ema.averages.values()]
    assert error < min(kept) / 5


def test_coefficients_are_the_best():
    profiles = np.array([(step, power_exponent(length)) for step in (100, 200, 300) for length in (0.05, 0.1)])
    target = np.array([300.0, power_exponent(0.15)])
    coefficients, error = combine_profiles(profiles, target)
    assert coefficients.sum() == pytest.approx(1)
    steps = (np.arange(30_000) + 0.5) / 100

    def distance(values) -> float:
        difference = sum(
            value * np.where(steps < t, (g + 1) * steps**g / t ** (g + 1), 0)
            for value, (t, g) in zip([*values, -1], [*profiles, target], strict=True)
        )
        return (difference**2).mean() ** 0.5

    assert distance(coefficients) / distance(np.zeros(6)) == pytest.approx(error, rel=1e-3)
    random = np.random.default_rng(0)
    for change in random.normal(0, 0.01, (20, 6)):
        assert distance(coefficients + change - change.mean()) > distance(coefficients)


def test_a_resumed_run_keeps_the_same(trained, accelerator, tmp_path):
    _, expected, _ = trained
    model = torch.nn.Linear(8, 1, bias=False)
    first = PowerEMA(accelerator, model, tmp_path / "run", every=30)
    (tmp_path / "run").mkdir()
    train(model, first, range(1, 201))
    accelerator.save_state(str(tmp_path / "run/checkpoint-200"))
    train(model, first, range(201, 251))
    accelerator._load_model_state_pre_hook.clear()
    second = PowerEMA(accelerator, model, tmp_path / "run", every=30)
    with pytest.raises(ValueError, match="but the checkpoint of step 200 has no such averages; leave it out or start"):
        second.check_resumed(200)
    accelerator.load_state(str(tmp_path / "run/checkpoint-200"))
    second.check_resumed(200)
    folder = tmp_path / "run" / SNAPSHOTS
    aside = sorted(path.name for path in folder.glob("superseded-*"))
    assert aside == ["superseded-00000210.safetensors", "superseded-00000240.safetensors"]
    train(model, second, range(201, STEPS + 1))
    for path, other in zip(snapshot_files(folder), snapshot_files(tmp_path / SNAPSHOTS), strict=True):
        assert path.read_bytes() == other.read_bytes()
    for length, average in expected.averages.items():
        assert torch.equal(second.averages[length]["weight"], average["weight"])


def test_faults(trained, tmp_path):
    model, power_ema, folder = trained
    with pytest.raises(ValueError, match=r"the length of an average is 0.3; give one above 0 and at most 0.28"):
        load_average(model, folder, 0.3)
    with pytest.raises(FileNotFoundError, match="has no snapshots of averages; train with --ema_snapshot_steps"):
        load_average(model, tmp_path, 0.1)
    with pytest.raises(ValueError, match=r"has weight of shape \(1, 8\), but the model's is \(8, 8\); name"):
        load_average(torch.nn.Linear(8, 8, bias=False), folder, 0.1)
    with pytest.raises(ValueError, match="can't be read as snapshots of this model"):
        load_average(torch.nn.Linear(8, 1), folder, 0.1)
    before = len(snapshot_files(folder))
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 401"):
        power_ema.step(RunState({}, global_step=401), last=True)
    assert len(snapshot_files(folder)) == before
