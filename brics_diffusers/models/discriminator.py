"""Discriminators for training the autoencoder: StyleGAN2's (App. A.3), and one that judges patches."""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..utils.safe_loading import SafeLoadingMixin
from ..utils.sizes import height_and_width
from .decoders.group_mlp import LEAKY_SLOPE, scaled_leaky_relu
from .decoders.style_decoder import EqualizedLinear, filter_2d


class EqualizedConv2d(nn.Module):
    """Convolution with equalized learning rate; `downsample` filters with [1, 3, 3, 1] and halves the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias=True, downsample=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W), or half H and W."""
        weight = self.weight * self.scale
        if not self.downsample:
            return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)
        if weight.shape[-1] == 1:  # filter and decimate first: the 1x1 product commutes with both
            return F.conv2d(filter_2d(x, stride=2), weight, self.bias)
        return F.conv2d(filter_2d(x, padding=2), weight, self.bias, stride=2)


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_in = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv_down = EqualizedConv2d(in_channels, out_channels, 3, downsample=True)
        self.shortcut = EqualizedConv2d(in_channels, out_channels, 1, bias=False, downsample=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / 2, W / 2)."""
        y = scaled_leaky_relu(self.conv_down(scaled_leaky_relu(self.conv_in(x))))
        return (y + self.shortcut(x)) / math.sqrt(2)


def minibatch_stddev(x: torch.Tensor, group_size: int = 4) -> torch.Tensor:
    r"""
    Appends a channel with the mean standard deviation within groups of the batch (Progressive GAN, Sec. 3).

    Args:
        x (`torch.Tensor` of shape (B, C, H, W)): Features.
        group_size (`int`, defaults to 4): Neighbouring images a group; the largest divisor of B up to it is used.

    Returns:
        `torch.Tensor` of shape (B, C + 1, H, W).
    """
    batch_size, channels, height, width = x.shape
    group_size = max(size for size in range(1, min(group_size, batch_size) + 1) if batch_size % size == 0)
    # At least float32: the epsilon vanishes in float16, and the gradient of the root with it.
    groups = x.view(-1, group_size, channels, height, width).to(torch.promote_types(x.dtype, torch.float32))
    deviation = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (B / group_size,)
    deviation = deviation.repeat_interleave(group_size).view(-1, 1, 1, 1).expand(-1, 1, height, width)
    return torch.cat([x, deviation.to(x.dtype)], dim=1)


class BricsDiscriminator(SafeLoadingMixin, ModelMixin, ConfigMixin):
    r"""
    Discriminator for the adversarial loss of [`BricsAutoencoder`] (App. A.3): residual blocks down to 4 x 4.

    Args:
        in_channels (`int`, defaults to 3): Channels of the image.
        sample_size (`int` or a pair, defaults to 256):
            Side of the image, or height and width: the shorter a power of two of at least 8, the longer a multiple of
            a quarter of it, so that images that are no squares end at 4 by more.
        base_channels (`int`, defaults to 16384): Width at a resolution is `base_channels / resolution`, limited by
            `max_channels`.
        max_channels (`int`, defaults to 512): Largest width.
        stddev_group_size (`int`, defaults to 4): Images a group of `minibatch_stddev`.

    Raises:
        `ValueError`: If `sample_size` is another.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 256,
        base_channels: int = 16384,
        max_channels: int = 512,
        stddev_group_size: int = 4,
    ):
        super().__init__()
        sides = height_and_width(sample_size, "sample_size")
        shorter = min(sides)
        if shorter < 8 or shorter & (shorter - 1):
            raise ValueError(f"sample_size is {sample_size}; the discriminator needs a power of two of at least 8.")
        if max(sides) % (shorter // 4):
            raise ValueError(
                f"sample_size is {sample_size}; the discriminator needs a longer side that is a multiple of "
                f"{shorter // 4}, a quarter of the shorter one."
            )
        resolutions = [2**power for power in range(int(math.log2(shorter)), 1, -1)]
        last = 4 * (4 * max(sides) // shorter)  # places at the last resolution, 16 for squares
        widths = [min(max(base_channels // resolution, 1), max_channels) for resolution in resolutions]
        self.conv_in = EqualizedConv2d(in_channels, widths[0], 1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(fan_in, fan_out) for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.conv_out = EqualizedConv2d(widths[-1] + 1, widths[-1], 3)
        self.linear = EqualizedLinear(widths[-1] * last, widths[-1])
        self.linear_out = EqualizedLinear(widths[-1], 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            sample (`torch.Tensor` of shape (B, in_channels, H, W)): Images of `sample_size` in [-1, 1].

        Returns:
            `torch.Tensor` of shape (B,): Logits, higher for images taken to be real.
        """
        expected = self.config.in_channels, *height_and_width(self.config.sample_size)
        if sample.ndim != 4 or sample.shape[1:] != expected:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; expected (batch, {', '.join(map(str, expected))})."
            )
        x = scaled_leaky_relu(self.conv_in(sample))
        for block in self.blocks:
            x = block(x)
        x = scaled_leaky_relu(self.conv_out(minibatch_stddev(x, self.config.stddev_group_size)))
        return self.linear_out(scaled_leaky_relu(self.linear(x.flatten(1)))).squeeze(1)


class PatchDiscriminator(SafeLoadingMixin, ModelMixin, ConfigMixin):
    r"""
    Discriminator that judges every patch of an image by itself (PatchGAN, Isola et al. 2017, arXiv 1611.07004):
    strided convolutions and two more at the last resolution, no normalisation. It is ours, not the paper's, which is
    [`BricsDiscriminator`]: one to try where that stays at chance, as in short runs on small collections.

    Args:
        in_channels (`int`, defaults to 3): Channels of the image.
        base_channels (`int`, defaults to 64): Channels after the first convolution; they double with every other one.
        num_layers (`int`, defaults to 2):
            Convolutions that halve the resolution; a logit sees 26 x 26 pixels with 2 of them, 54 x 54 with 3.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 2):
        super().__init__()
        widths = [in_channels, *(base_channels * 2**layer for layer in range(num_layers + 1))]
        halving = [
            nn.Conv2d(fan_in, fan_out, 4, 2, 1) for fan_in, fan_out in zip(widths[:-2], widths[1:-1], strict=True)
        ]
        self.convs = nn.ModuleList([*halving, nn.Conv2d(widths[-2], widths[-1], 3, padding=1)])
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            sample (`torch.Tensor` of shape (B, in_channels, H, W)): Images in [-1, 1].

        Returns:
            `torch.Tensor` of shape (B, H / 2**num_layers, W / 2**num_layers): Logits, higher for patches taken to be
            real.
        """
        for conv in self.convs:
            sample = F.leaky_relu(conv(sample), LEAKY_SLOPE)
        return self.conv_out(sample).squeeze(1)
