"""Stage one in bfloat16 and float16, and one loss scale for two optimizers."""

import pytest
import torch
import train_autoencoder
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from launching import CONFIG, assert_same_movement, train_here
from safetensors.torch import load_file
from test_train_autoencoder import read_log


def test_bfloat16_run(tmp_path, image_folder, write_config):
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", tmp_path]
    # The discriminator of two steps makes images worse at first: what is learnt before it comes is what counts.
    flags += ["--mixed_precision", "bf16", "--learning_rate", 5e-3, "--gan_start_step", 32, "--max_train_steps", 34]
    train_here(train_autoencoder.main, *flags)
    events = read_log(tmp_path)
    assert events.Scalars("train/skipped_steps")[-1].value == 0
    losses = [event.value for event in events.Scalars("train/mse")]
    assert len(losses) == 34 and [event.step for event in events.Scalars("train/r1")] == [33]
    # 0.48 to 0.70 with five seeds.
    assert sum(losses[27:32]) < 0.85 * sum(losses[:5])
    weights = load_file(tmp_path / "checkpoint-34" / "model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_float16_stays_finite_for_hundreds_of_steps(monkeypatch):
    """What accelerate does for fp16 on a GPU, on the CPU: autocast forward passes and one loss scale."""
    flags = ["--dataset_name", "x", "--perceptual_weight", "0", "--gradient_penalty_interval", "4"]
    args = train_autoencoder.parse_args(flags)
    args.autoencoder, args.discriminator = CONFIG["autoencoder"], CONFIG["discriminator"]
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", dtype=torch.float16))
    torch.manual_seed(0)
    trainer = train_autoencoder.Trainer(args, accelerator)
    for network in trainer.networks:
        network.forward = convert_outputs_to_fp32(accelerator.autocast()(network.forward))
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=32, mode="bilinear")
    steps = [trainer.step(images, step) for step in range(300)]
    errors = torch.stack([parts["mse"] for parts, _ in steps])
    assert errors.isfinite().all() and errors[-1] < errors[0] / 2
    assert all(parts["r1"].dtype == torch.float32 for parts, _ in steps[::4])
    assert sum(not finite for _, finite in steps) < 20  # the scale starts at 2**16 and halves at an overflow
    for network in trainer.networks:
        assert all(parameter.isfinite().all() for parameter in network.parameters())


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
        torch.nn.init.normal_(trainer.unwrapped.grids.entries)  # near 0, rounding would grow from step to step
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
