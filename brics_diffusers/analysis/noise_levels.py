"""Noise levels of the schedules, and what a key code decodes to under noise (App. A.6 and D.2, Fig. 12 and 13)."""

import torch

from ..metrics.reconstruction import row_generator
from ..models import BricsAutoencoder
from ..pipelines.pipeline_brics_key_code import key_codes_to_latents, latents_to_key_codes
from ..schedulers import CosineVariantScheduler
from ..schedulers.min_snr import min_snr_weights
from ..schedulers.scheduling_cosine_variant import GAMMA_SCHEDULES


def log_snr(scheduler) -> torch.Tensor:
    """
    Natural logarithm of the signal-to-noise ratio, log(alpha-bar / (1 - alpha-bar)), of every train step, float64.
    """
    return scheduler.alphas_cumprod.double().logit()


def schedule_curves(
    num_train_timesteps: int = 1000, prediction_type: str = "epsilon", snr_gamma: float = 5.0
) -> dict[str, dict[str, list[float]]]:
    """
    Noise levels and loss weights of every schedule over time (Fig. 13), as lists over train steps: `"t"`, (step + 1) /
    T; `"log_snr"`; `"log_snr_capped"`, min(logSNR, log gamma); and `"min_snr_weight"`.

    Without min-SNR, the loss of every step has weight 1. With it, the weight is min(SNR, gamma)/SNR for noise
    prediction and min(SNR, gamma)/(SNR + 1) for velocities. To a model of the clean sample it is as if the SNR were
    capped, so that logSNR is shown capped, too.
    """
    curves = {}
    steps = torch.arange(num_train_timesteps)
    for name in GAMMA_SCHEDULES:
        scheduler = CosineVariantScheduler(num_train_timesteps, name, prediction_type=prediction_type)
        weights = min_snr_weights(scheduler, steps, snr_gamma)
        levels = log_snr(scheduler)
        curves[name] = {
            "t": ((steps + 1) / num_train_timesteps).tolist(),
            "log_snr": levels.tolist(),
            "log_snr_capped": levels.clamp(max=torch.tensor(snr_gamma).log().item()).tolist(),
            "min_snr_weight": weights.tolist(),
        }
    return curves


@torch.no_grad()
def decode_noised(
    autoencoder: BricsAutoencoder, images: torch.Tensor, scheduler, times: list[float], seed: int = 0
) -> torch.Tensor:
    """
    What key codes of images (B, 3, H, W) decode to, (B, times, 3, H, W) and not clipped, when noise is added to them
    as in training the diffusion model (Fig. 12): latents, scaled as the autoencoder's config says, are noised, mapped
    back and clipped to [0, 1]. Of the times in [0, 1], 0 is the clean code, 1 the last train step; the noise is the
    same for all times and schedulers.
    """
    if not all(0 <= time <= 1 for time in times):
        raise ValueError(f"times are {times}; each must lie in [0, 1].")
    factor = autoencoder.scaling_factor
    latents = key_codes_to_latents(autoencoder.encode(images).key_codes, factor)
    noise = [torch.randn(latents.shape[1:], generator=row_generator(seed, row)) for row in range(len(latents))]
    noise = torch.stack(noise).to(latents)
    total = scheduler.config.num_train_timesteps
    decoded = []
    for time in times:
        step = round(time * total) - 1
        noised = latents
        if step >= 0:
            noised = scheduler.add_noise(latents, noise, torch.full((len(latents),), step, device=latents.device))
        decoded.append(autoencoder.decode(latents_to_key_codes(noised, factor)).sample)
    return torch.stack(decoded, dim=1)
