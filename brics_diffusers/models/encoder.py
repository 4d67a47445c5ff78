"""diffusers' encoder with a shortcut from the image to the key code."""

import torch
from diffusers.models.autoencoders.vae import Encoder
from torch import nn


class ShortcutEncoder(Encoder):
    """
    diffusers' encoder, and beside it one strided convolution from the image to the logits, or to their means where the
    encoder gives log-variances too. Arguments by name, as of `Encoder`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        factor = 2 ** (len(kwargs["block_out_channels"]) - 1)
        self.shortcut = nn.Conv2d(kwargs["in_channels"], kwargs["out_channels"], factor, stride=factor)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / f, W / f), or twice the channels."""
        logits, shortcut = super().forward(sample), self.shortcut(sample)
        log_variances = logits[:, shortcut.shape[1] :]  # none but with a double output
        return torch.cat([logits[:, : shortcut.shape[1]] + shortcut, log_variances], dim=1)
