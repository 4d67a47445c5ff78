"""Loss weights that even out noise levels: min-SNR (Hang et al. 2023, arXiv 2303.09556)."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from .scheduling_cosine_variant import PREDICTION_TYPES


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """
    Weights of the training loss that cap each step's signal-to-noise ratio (Hang et al. 2023, min-SNR).

    For a squared error in the clean sample the weight is `min(SNR, gamma)`. The same in terms of the noise is that
    over `SNR`, and of the velocity that over `SNR + 1`.

    Args:
        scheduler ([`DDPMScheduler`]):
            A scheduler with `alphas_cumprod`; its `prediction_type` is what the loss compares.
        timesteps (`torch.Tensor` of shape `(batch_size,)`):
            Train steps, integers.
        gamma (`float`, defaults to `5.0`):
            The cap.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: the weights in float32, on the device of `timesteps`.

    Raises:
        ValueError: for `gamma` not above 0, or a `prediction_type` that has no such weight.
    """
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}; the cap on the signal-to-noise ratio must be above 0.")
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type is {prediction_type!r}; min-SNR weights exist for {', '.join(PREDICTION_TYPES)}."
        )
    snr = compute_snr(scheduler, timesteps).float()
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1.0) if prediction_type == "v_prediction" else capped
