import argparse
import time
from functools import partial

import pytest
import torch
import train_autoencoder
from accelerate import Accelerator
from diffusers import VQModel
from launching import CONFIG, assert_same_movement

from brics_diffusers import BricsAutoencoder
from brics_diffusers.models.loading import load_autoencoder
from brics_diffusers.training_utils.checkpoints import RunState
from brics_diffusers.training_utils.optimization import (
    SkippedSteps,
    build_lr_scheduler,
    check_weights,
    step_if_finite,
)
from brics_diffusers.training_utils.run import StepLog
from brics_diffusers.utils.image_grids import image_grid, side_by_side


class TestTwoOptimizersWithOneLossScale:
    """The trainer with the loss scale of fp16, which accelerate itself gives on a GPU only."""

    def moves(self, scaler, accumulation):
        flags = ["--dataset_name", "x", "--perceptual_weight", "0", "--learning_rate", "0.1", "--adam_epsilon", "1.0"]
        args = train_autoencoder.parse_args([*flags, "--discriminator_adam_epsilon", "1.0"])
        args.autoencoder = CONFIG["autoencoder"] | {"regularization": "none"}
        args.discriminator = CONFIG["discriminator"]
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        accelerator.scaler = scaler
        torch.manual_seed(0)
        trainer = train_autoencoder.Trainer(args, accelerator)
        torch.nn.init.normal_(trainer.bare.grids.entries)  # near 0, rounding would grow from step to step
        parameters = [parameter for model in trainer.networks for parameter in model.parameters()]
        before = [parameter.detach().clone() for parameter in parameters]
        images = torch.rand(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for step in range(3):
            for part in images[step].chunk(accumulation):
                finite = trainer.step(part, step)[1]
            assert finite
        assert accelerator.sync_gradients
        return [parameter.detach() - start for parameter, start in zip(parameters, before, strict=True)]

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_the_scale_does_not_matter(self, accumulation):
        plain = self.moves(None, 1)
        # It grows at every step, so that gradients of one scale would show if divided by another.
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
        moves = self.moves(scaler, accumulation)
        assert_same_movement(dict(enumerate(plain)), dict(enumerate(moves)), rtol=0.03)  # rounding over three steps
        assert scaler.get_scale() == 256 * 2**3


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


def test_missing_autoencoder_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere provides no config.json .*; name the folder of a saved BricsAutoencoder"
    ):
        load_autoencoder(str(tmp_path / "nowhere"))


def test_other_models_are_no_autoencoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq")
    (tmp_path / "empty").mkdir()
    assert isinstance(load_autoencoder(str(tmp_path / "pipe")), BricsAutoencoder)
    for name, error, message in (
        ("pipe/unet", ValueError, "unet/config.json is that of a UNet2DModel, but a BricsAutoencoder is needed; name"),
        ("vq", ValueError, "vq/config.json is that of a VQModel, but a BricsAutoencoder is needed; name"),
        ("no/such", FileNotFoundError, "no/such provides no config.json .*; name the folder of a saved"),
        ("empty", FileNotFoundError, "empty provides no config.json .*; name the folder of a saved"),
    ):
        with pytest.raises(error, match=message):
            load_autoencoder(name if name == "no/such" else str(tmp_path / name))


def test_pictures():
    targets, samples = torch.full((3, 3, 4, 4), -1.0), torch.full((3, 3, 4, 4), 2.0)
    picture = side_by_side(targets, samples)
    assert picture.size == (3 * 6 + 2, 2 * 6 + 2)
    assert picture.getpixel((3, 3)) == (0, 0, 0) and picture.getpixel((3, 9)) == (255, 255, 255)
    assert image_grid(targets, columns=2).size == (2 * 6 + 2, 2 * 6 + 2)


def test_no_file_of_the_validation_set_is_readable(tmp_path, image_folder, write_config, run_here):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "validation").mkdir()
    for file in list(image_folder.glob("0*.png")):
        (tmp_path / "data" / "train" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data" / "validation" / "bad.png").write_text("no image")
    flags = ["--config", str(write_config()), "--dataset_name", str(tmp_path / "data"), "--output_dir"]
    run_here(train_autoencoder.main, *flags, tmp_path / "run", "--max_train_steps", 1)
    assert (tmp_path / "run" / "autoencoder" / "config.json").exists()
