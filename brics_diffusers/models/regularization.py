"""What perturbs key codes in training, as functions of tensors."""

import torch
from diffusers.utils.torch_utils import randn_tensor


REGULARIZATIONS = ("noise", "kl", "none", "interpolate")


def relax_precision(key_codes: torch.Tensor, scale: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Adds Gaussian noise of standard deviation `scale` to key codes and clips them to [0, 1] (Sec. 3.4, App. D)."""
    noise = randn_tensor(key_codes.shape, generator=generator, device=key_codes.device, dtype=key_codes.dtype)
    return (key_codes + scale * noise).clamp(0, 1)


def interpolate_with_noise(
    key_codes: torch.Tensor, gamma: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Moves key codes (B, ...) towards noise by a random share of the way, l-DeTok's way to train a tokenizer (Yang et
    al. 2025, arXiv 2507.15856): of latents u = 2 (z - 0.5) in [-1, 1] it makes (1 - t) u + t gamma n, with one t ~
    U(0, 1) an image and n ~ N(0, I), which are mapped back and clipped.
    """
    options = {"generator": generator, "device": key_codes.device}
    # Their distribution function makes uniform numbers of normal ones, which come from any kind of generator; in
    # float32, since bfloat16 has few numbers.
    shares = randn_tensor((len(key_codes), *[1] * (key_codes.ndim - 1)), dtype=torch.float32, **options)
    shares = torch.special.ndtr(shares).to(key_codes.dtype)  # (B, 1, ...)
    noise = randn_tensor(key_codes.shape, dtype=key_codes.dtype, **options)
    latents = (1 - shares) * (2 * (key_codes - 0.5)) + shares * gamma * noise
    return (latents / 2 + 0.5).clamp(0, 1)
