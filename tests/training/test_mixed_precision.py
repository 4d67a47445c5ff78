import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from small_models import AUTOENCODER
from test_train_autoencoder import read_log

from brics_diffusers import BricsAutoencoder, BricsDiscriminator
from brics_diffusers.losses import DiscriminatorLoss, adversarial_loss, reconstruction_loss


def test_bfloat16_run(tmp_path, image_folder, write_config):
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", tmp_path]
    launch("train_autoencoder.py", *flags, "--mixed_precision", "bf16", "--max_train_steps", 20)
    events = read_log(tmp_path)
    assert events.Scalars("train/skipped_steps")[-1].value == 0
    losses = [event.value for event in events.Scalars("train/mse")]
    assert len(losses) == 20 and losses[-1] < losses[0]
    weights = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_float16_stays_finite_for_hundreds_of_steps():
    """What accelerate does for fp16 on a GPU, on the CPU: autocast, and one loss scale for both networks."""
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER)
    critic = DiscriminatorLoss(BricsDiscriminator(sample_size=32, base_channels=256, max_channels=16))
    optimizers = [torch.optim.Adam(model.parameters(), 2e-3, (0.0, 0.99)) for model in (autoencoder, critic)]
    scaler = torch.amp.GradScaler("cpu")
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=32, mode="bilinear")
    errors, skipped = [], 0
    for step in range(300):
        critic.requires_grad_(False)
        with torch.autocast("cpu", dtype=torch.float16):
            sample = autoencoder(images).sample
            logits = critic.discriminator(sample)
        loss, parts = reconstruction_loss(sample.float(), images, lpips_weight=0)
        scaler.scale(loss + adversarial_loss(logits.float())).backward()
        critic.requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.float16):
            critic_loss, _ = critic(images, sample.detach().float(), penalize=step % 16 == 0)
        scaler.scale(critic_loss).backward()
        scale = scaler.get_scale()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        for optimizer in optimizers:
            optimizer.zero_grad()
        errors.append(parts["mse"].item())
    assert all(torch.tensor(errors).isfinite()) and errors[-1] < errors[0] / 2
    assert skipped < 20  # the scale starts at 2**16 and halves at an overflow
    for model in (autoencoder, critic):
        assert all(parameter.isfinite().all() for parameter in model.parameters())
