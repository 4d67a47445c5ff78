"""A step's way into the weights and into the log: warm-up, steps that are not finite, averages of losses."""

import argparse
import time
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from brics_diffusers.training_utils.checkpoints import RunState
from brics_diffusers.training_utils.optimization import (
    SkippedSteps,
    build_lr_scheduler,
    check_weights,
    step_if_finite,
)
from brics_diffusers.training_utils.run import StepLog


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warmup(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0)
    args = argparse.Namespace(lr_scheduler=name, lr_warmup_steps=4, max_train_steps=10)
    scheduler = build_lr_scheduler(args, optimizer)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0, 0.25, 0.5, 0.75] and scheduler.get_last_lr()[0] == 1


OPTIMIZERS = {"fused": partial(torch.optim.Adam, fused=True), "plain": partial(torch.optim.Adam, foreach=False)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_step_if_finite(kind):
    """What is not finite changes nothing of its optimizer, and later steps are as if it had not been."""
    accelerator = Accelerator(cpu=True)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [accelerator.prepare(OPTIMIZERS[kind]([weight], 1.0, eps=1.0)) for weight in weights]
    nan = float("nan")
    for gradient, taken in (([0.0, nan, 0.0], False), ([3.0, 4.0, 0.0], True), ([nan] * 3, False)):
        before = weights[1].detach().clone()
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor(gradient)
        assert step_if_finite(accelerator, optimizers, 1.0, torch.tensor(0.0)) == taken
        assert weights[1].equal(before) != taken and weights[1].grad is None
        assert not hasattr(optimizers[1].optimizer, "found_inf")
    # Clipped from norm 5 to 1; Adam's first step is g / (|g| + eps).
    torch.testing.assert_close(weights[1].detach(), 1 - torch.tensor([0.6 / 1.6, 0.8 / 1.8, 0.0]))
    assert optimizers[1].state[weights[1]]["step"] == 1 and optimizers[0].state[weights[0]]["step"] == 3


def test_a_norm_that_overflows_is_not_finite():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare(torch.optim.SGD([weight], 1.0))
    accelerator.scaler.scale((weight * 3e38).sum()).backward()
    assert not step_if_finite(accelerator, [optimizer], None, torch.tensor(0.0))
    assert torch.equal(weight.detach(), torch.ones(3))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_takes_no_step(scaled):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if scaled else None
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare(torch.optim.SGD([weight], 1.0))
    for loss, taken in ((float("inf"), False), (1.0, True)):
        value = weight.sum() if accelerator.scaler is None else accelerator.scaler.scale(weight.sum())
        value.backward()
        assert step_if_finite(accelerator, [optimizer], None, torch.tensor(loss)) == taken
        assert torch.equal(weight.detach(), torch.zeros(3) if taken else torch.ones(3))


def test_check_weights(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    networks, state = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], RunState({})
    state.global_step = 3
    check_weights(networks, state, tmp_path)
    networks[1].bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 3; .*resume from .*checkpoint-2"):
        check_weights(networks, state, tmp_path)


@pytest.mark.parametrize("interval", [1, 5, 100])
def test_skipped_steps_name_the_last_good_checkpoint(interval, tmp_path):
    """Whenever the log makes them be read: each time, after some steps, or never."""
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = RunState({})
    skipped = SkippedSteps(state, 3, interval, tmp_path)
    for finite, step in ((True, 4), (False, 5), (True, 6), (False, 7), (False, 8)):
        state.global_step = step
        skipped.add(torch.tensor(finite))
    assert not skipped.read() and not skipped.read()
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 2)
    state.global_step = 9
    # Step 7, the first after checkpoint 6, went wrong: that checkpoint may be to blame.
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 9.*resume from .*checkpoint-4"):
        skipped.add(torch.tensor(False))
        skipped.read()


def test_step_log_averages_and_keeps_rare_losses():
    accelerator, state, logged = Accelerator(cpu=True), RunState({}), {}
    accelerator.log = lambda values, step: logged.setdefault(step, values)
    log = StepLog(accelerator, state, total=4, images_per_step=8, interval=2)
    for step in range(1, 5):
        state.global_step = step
        with log.waiting():
            time.sleep(0.1 if step > 2 else 0)
        log.add({"mse": torch.tensor(float(step))} | ({"r1": torch.tensor(7.0)} if step == 1 else {}))
        log.step({"learning_rate": 0.5})
    assert logged[2]["train/mse"] == 1.5 and logged[4]["train/mse"] == 3.5
    assert logged[2]["train/r1"] == 7 and "train/r1" not in logged[4]
    assert logged[4]["train/images_per_second"] > 0 and logged[4]["train/peak_memory_mib"] > 0
    # The second interval of two steps is hardly more than its pauses, the first hardly less than what is not.
    assert 0 <= logged[2]["train/data_wait_share"] < logged[4]["train/data_wait_share"] <= 1
