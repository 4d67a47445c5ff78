"""What the autoencoder's methods return."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class BricsEncoderOutput(BaseOutput):
    r"""
    Output of [`BricsAutoencoder.encode`].

    Args:
        key_codes (`torch.Tensor` of shape (B, C_z, H_z, W_z)): Key codes in [0, 1].
        kl_loss (`torch.Tensor` of shape (B,), *optional*):
            Divergence of the logits from N(0, I), summed over a code; with `regularization="kl"` only.
    """

    key_codes: torch.Tensor
    kl_loss: torch.Tensor | None = None

    @property
    def latents(self) -> torch.Tensor:
        """The key codes, by the name that diffusers has for what `decode` takes; a pipeline's are scaled."""
        return self.key_codes


@dataclass
class BricsDecoderOutput(BaseOutput):
    r"""
    Output of [`BricsAutoencoder.decode`].

    Args:
        sample (`torch.Tensor` of shape (B, out_channels, H, W)): Images, nominally in [-1, 1], not clipped.
    """

    sample: torch.Tensor


@dataclass
class BricsAutoencoderOutput(BaseOutput):
    r"""
    Output of [`BricsAutoencoder.forward`].

    Args:
        sample (`torch.Tensor` of shape (B, out_channels, H, W)): Reconstructions, nominally in [-1, 1], not clipped.
        key_codes (`torch.Tensor` of shape (B, C_z, H_z, W_z)): The key codes they were decoded from.
        kl_loss (`torch.Tensor` of shape (B,), *optional*): As in [`BricsEncoderOutput`].
    """

    sample: torch.Tensor
    key_codes: torch.Tensor = None  # the defaults let accelerate rebuild the output from a dictionary
    kl_loss: torch.Tensor | None = None
