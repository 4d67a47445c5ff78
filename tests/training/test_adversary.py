"""The discriminator beside the autoencoder: when it learns and counts, and with which weight and optimizer."""

import math

import pytest
import torch
import train_autoencoder
from accelerate import Accelerator
from launching import CONFIG, assert_same_movement, launch, movement, train_here
from test_train_autoencoder import read_log

from brics_diffusers import BricsAutoencoder, BricsDiscriminator
from brics_diffusers.training_utils.adversary import adaptive_weight, last_layer_weight, lazy_correction
from brics_diffusers.training_utils.losses import DiscriminatorLoss


STYLE = {"decoder_block_out_channels": (16, 8)}
MOVQ = {"decoder_type": "movq", "decoder_block_out_channels": (32, 32)}
VQGAN = {"decoder_type": "vqgan", "decoder_block_out_channels": (16, 8)}


def build_trainer(*flags, accelerator=None, **changes):
    words = ["--dataset_name", "x", "--perceptual_weight", "0", *map(str, flags)]
    args = train_autoencoder.parse_args(words)
    args.autoencoder = CONFIG["autoencoder"] | {"regularization": "none"} | changes
    args.discriminator = CONFIG["discriminator"]
    torch.manual_seed(0)
    return train_autoencoder.Trainer(args, accelerator or Accelerator(cpu=True))


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestStart:
    def test_it_learns_before_it_counts(self, images):
        trainer = build_trainer("--discriminator_start_step", 1, "--gan_start_step", 2)
        weight, moved, logged = trainer.adversary.network.discriminator.linear_out.weight, [], []
        for step in range(3):
            before = weight.detach().clone()
            parts, finite = trainer.step(images, step)
            assert finite
            moved.append(not torch.equal(weight, before))
            logged.append({"discriminator", "adversarial"} & parts.keys())
        assert moved == [False, True, True]
        assert logged == [set(), {"discriminator"}, {"discriminator", "adversarial"}]

    def test_learning_alone_it_changes_nothing_for_the_autoencoder(self, images):
        weights = []
        for flags in (["--discriminator_start_step", 0], ["--adversarial_weight", 0]):
            trainer = build_trainer("--gan_start_step", 9, *flags)
            for step in range(2):
                trainer.step(images, step)
            weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.unwrapped.parameters()]))
        assert torch.equal(*weights)

    def test_it_can_not_count_before_it_learns(self):
        with pytest.raises(ValueError, match="_start_step is 3, after --gan_start_step 2; a disc.* raise"):
            build_trainer("--discriminator_start_step", 3, "--gan_start_step", 2)


class TestAdaptiveWeight:
    @pytest.mark.parametrize("decoder", [STYLE, MOVQ, VQGAN], ids=["style", "movq", "vqgan"])
    def test_gradients_have_the_same_norm_at_the_last_layer(self, decoder, images):
        model = BricsAutoencoder(**CONFIG["autoencoder"] | decoder)
        weight = last_layer_weight(model)
        assert weight.shape[0] == 3 or weight.shape[1] == 3 or weight.shape[-1] == 3
        sample = model(images).sample
        losses = 20 * (sample - images).square().mean(), -sample.mean()
        ratio = adaptive_weight(Accelerator(cpu=True), *losses, weight)
        assert not ratio.requires_grad
        norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in losses]
        torch.testing.assert_close(ratio, norms[0] / (norms[1] + 1e-4))
        (losses[0] + ratio * losses[1]).backward()  # the graph is still there
        assert weight.grad is not None

    def test_loss_scale_cancels_and_the_weight_is_limited(self):
        accelerator, weight = Accelerator(cpu=True), torch.nn.Parameter(torch.ones(3, 2))
        losses = (3 * weight).sum(), (weight * 0.5).sum()
        plain = adaptive_weight(accelerator, *losses, weight)
        assert plain.item() == pytest.approx(6, rel=1e-3)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        torch.testing.assert_close(adaptive_weight(accelerator, *losses, weight), plain)
        assert adaptive_weight(accelerator, losses[0], 0 * losses[1], weight) == 1e4

    @pytest.mark.parametrize("broken", [0, 1])
    def test_a_gradient_that_overflows_makes_no_weight(self, broken):
        weight = torch.nn.Parameter(torch.ones(3))
        losses = [weight.sum() * (3e38 if index == broken else 1) * 2 for index in range(2)]
        assert adaptive_weight(Accelerator(cpu=True), *losses, weight).isnan()

    @pytest.mark.parametrize("decoder", [STYLE, MOVQ], ids=["style", "movq"])
    def test_gradient_checkpointing_changes_nothing(self, decoder, images):
        weights = []
        for flag in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
            trainer = build_trainer("--adaptive_gan_weight", flag, **decoder)
            parts, finite = trainer.step(images, 0)
            assert finite
            weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.unwrapped.parameters()]))
        torch.testing.assert_close(*weights)

    def test_with_a_loss_scale(self, images):
        """Both losses of fp16 overflow at first, whatever they are multiplied by; the scale falls until they don't."""
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        trainer = build_trainer("--adaptive_gan_weight", accelerator=accelerator)
        finite = [trainer.step(images, step)[1] for step in range(24)]
        # Near the largest scale that they bear, a larger gradient overflows again now and then.
        assert not finite[0] and any(finite[-8:]) and accelerator.scaler.get_scale() < 2.0**127

    def test_half_precision_weight_has_float32_norms(self):
        weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.float16))
        losses = (100 * weight).sum(dtype=torch.float32), weight.sum(dtype=torch.float32)
        ratio = adaptive_weight(Accelerator(cpu=True), *losses, weight)  # 100 * 64 squared is too large for float16
        assert ratio.dtype == torch.float32 and ratio.item() == pytest.approx(100, rel=1e-3)

    def test_in_training_with_accumulation(self, images):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        trainer = build_trainer("--adaptive_gan_weight", "--gan_warmup_steps", 4, accelerator=accelerator)
        before = trainer.unwrapped.decoder.blocks[-1].to_rgb.weight.detach().clone()
        for half in images.chunk(2):
            parts, finite = trainer.step(half, 0)
            assert 0 < parts["adaptive_gan_weight"] < 1e4
            assert (finite is None) == (not accelerator.sync_gradients)
        assert finite
        assert not torch.equal(trainer.unwrapped.decoder.blocks[-1].to_rgb.weight, before)

    @pytest.mark.slow
    def test_two_processes_equal_one_with_doubled_batch(self, tmp_path, image_folder, write_config):
        config = write_config({"autoencoder": {"regularization": "none"}})
        moves = []
        for processes in (1, 2):
            output_dir = tmp_path / str(processes)
            flags = ["--adam_epsilon", 1.0, "--discriminator_adam_epsilon", 1.0, "--learning_rate", 0.2]
            flags += ["--train_batch_size", 4 // processes, "--adaptive_gan_weight", "--gan_start_step", 1]
            flags += ["--discriminator_start_step", 0, "--max_train_steps", 2, "--checkpointing_steps", 1]
            flags += ["--config", config, "--dataset_name", image_folder, "--num_validation_images", 0]
            launch("train_autoencoder.py", *flags, "--output_dir", output_dir, processes=processes)
            moves.append(movement(output_dir, 1, 2, ("model", "model_1")))
        assert_same_movement(*moves)


class TestOptimizer:
    def test_lazy_correction(self):
        assert lazy_correction(16, 4.0) == 16 / 17 and lazy_correction(1, 4.0) == 1 and lazy_correction(16, 0.0) == 1

    @pytest.mark.parametrize(("flag", "power"), [("--lazy_r1_correction", 4 / 5), ("--no-lazy_r1_correction", 1)])
    def test_rate_and_betas(self, images, flag, power):
        flags = ["--gradient_penalty_interval", 4, "--discriminator_adam_beta1", 0.5, "--lr_scheduler", "cosine"]
        trainer = build_trainer(*flags, "--max_train_steps", 2, "--discriminator_learning_rate", 1e-4, flag)
        group = trainer.adversary.optimizer.param_groups[0]
        assert group["betas"] == (0.5**power, 0.99**power)
        for step, share in enumerate((1, 0.5)):
            trainer.step(images, step)
            assert group["lr"] == pytest.approx(1e-4 * power * share)

    def test_momentum_of_the_autoencoder(self, images):
        for flags, expected in (([], [0.8, 0.8]), (["--adam_beta1_gan", 0], [0.8, 0])):
            trainer = build_trainer("--gan_start_step", 1, "--adam_beta1", 0.8, *flags)
            found = []
            for step in range(2):
                trainer.step(images, step)
                found.append(trainer.optimizer.param_groups[0]["betas"][0])
            assert found == expected and trainer.adversary.optimizer.param_groups[0]["betas"][0] == 0

    def test_same_rate_as_the_autoencoder_by_default(self, images):
        trainer = build_trainer("--gradient_penalty_interval", 1, "--learning_rate", 3e-4)
        trainer.step(images, 0)
        assert trainer.adversary.optimizer.param_groups[0]["lr"] == 3e-4


class TestAugmentation:
    def test_both_sides_are_augmented_and_r1_is_of_plain_images(self, images, monkeypatch):
        torch.manual_seed(0)
        critic = DiscriminatorLoss(BricsDiscriminator(sample_size=32, **CONFIG["discriminator"]), 4.0, 1, "color")
        plain = DiscriminatorLoss(critic.discriminator, 4.0, 1)
        (loss, parts), (other, other_parts) = (module(images, -images, True) for module in (critic, plain))
        assert torch.equal(parts["r1"], other_parts["r1"]) and not torch.equal(loss, other)
        assert not torch.equal(critic.logits(images), critic.logits(images))  # drawn anew

    def test_a_run(self, images):
        trainer = build_trainer("--augmentation", "color,translation,cutout", "--adaptive_gan_weight")
        parts, finite = trainer.step(images, 0)
        assert finite and all(math.isfinite(value) for value in parts.values())


class TestBest:
    @pytest.mark.parametrize(
        ("flags", "network", "names"),
        [
            ([], True, ["psnr", "psnr", "distance"]),
            ([], False, ["psnr", "psnr", "psnr"]),
            (["--best_metric", "psnr"], True, ["psnr"] * 3),
            (["--best_metric", "perceptual"], True, ["distance"] * 3),
            (["--adversarial_weight", "0"], True, ["psnr"] * 3),
        ],
    )
    def test_what_decides(self, flags, network, names, monkeypatch):
        metric = torch.nn.Identity()
        metric.metric_name = "distance"
        monkeypatch.setattr(train_autoencoder, "load_perceptual_network", lambda name: metric)
        monkeypatch.setattr(train_autoencoder, "perceptual_is_cached", lambda name: network)
        trainer = build_trainer("--gan_start_step", 2, *flags)
        assert [trainer.best_metric(step) for step in (1, 2, 3)] == names


@pytest.mark.parametrize(
    ("starts", "optimizer"),
    [((1, 2), "adam"), ((2, 3), "muon"), ((3, 3), "adam")],
    ids=["before", "with", "after"],
)
def test_a_run_with_everything_resumes_alike(starts, optimizer, tmp_path, image_folder, write_config):
    """With a discriminator that begins to learn before the checkpoint, at it, or later."""
    flags = ["--optimizer", optimizer]
    flags += ["--config", write_config(), "--dataset_name", image_folder, "--discriminator_start_step", starts[0]]
    flags += ["--gan_start_step", starts[1], "--adaptive_gan_weight", "--augmentation", "color,translation,cutout"]
    flags += ["--checkpointing_steps", 2, "--validation_steps", 2, "--save_validation_weights"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(train_autoencoder.main, *flags, "--output_dir", whole)
    for steps in (2, 4):
        resume = ["--max_train_steps", steps, "--resume_from_checkpoint", "latest"]
        printed = train_here(train_autoencoder.main, *flags, "--output_dir", broken, *resume)
    assert "Resumed from" in printed and "The run can't end" not in printed
    for name in ("model.safetensors", "model_1.safetensors"):
        files = [folder / "checkpoint-4" / name for folder in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert {path.name for path in whole.glob("autoencoder*")} == {
        *("autoencoder", "autoencoder-best", "autoencoder-2", "autoencoder-4")
    }
    last, kept = ((whole / name / "diffusion_pytorch_model.safetensors") for name in ("autoencoder", "autoencoder-4"))
    assert last.read_bytes() == kept.read_bytes()
    log = read_log(whole)
    scalars = log.Tags()["scalars"]
    assert 0 < log.Scalars("train/grid_usage")[-1].value <= 1
    assert "train/adaptive_gan_weight" in scalars and "train/adversarial" in scalars
