"""StyleGAN2-type synthesis network that starts from a feature block (Sec. 3.3)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .group_mlp import ACTIVATION_GAIN, LEAKY_SLOPE


def filter_2d(
    x: torch.Tensor, gain: float = 1.0, padding: int = 1, stride: int = 1, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Low-pass filter [1, 3, 3, 1] in both directions, the same for every channel of (B, C, H, W), with a kernel that
    sums to `gain`; (B, C, (H + 2 * padding - 4) // stride + 1, ...). A bias (C,) is added without a pass of its own.
    """
    return F.conv2d(x, _kernel(x, gain), bias, padding=padding, stride=stride, groups=x.shape[1])


def upsample_2d(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): zeros between the pixels, then the [1, 3, 3, 1] filter."""
    return F.conv_transpose2d(x, _kernel(x, 4.0), stride=2, padding=1, groups=x.shape[1])


def _kernel(x: torch.Tensor, gain: float) -> torch.Tensor:
    taps = x.new_ones(4)  # made where it is needed: a copy from the host would wait for a GPU
    taps[1:3] = 3
    return (torch.outer(taps, taps) * (gain / 64)).expand(x.shape[1], 1, 4, 4)


class EqualizedLinear(nn.Module):
    """Linear layer with N(0, 1) weights that are scaled by `1 / sqrt(in_features)` when used."""

    def __init__(self, in_features: int, out_features: int, bias_init: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.scale = 1 / math.sqrt(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_features) -> (B, out_features)."""
        return F.linear(x, self.weight * self.scale, self.bias)


class ModulatedConv2d(nn.Module):
    r"""
    Convolution whose input channels are scaled by a style, and whose outputs are brought back to unit variance. New
    ones have the same scale, 1, for every style, as DiT begins its modulation (adaLN-Zero): it is learned where it
    helps.

    One image has its weights scaled, which are fewer than its activations. Of a batch the activations are scaled, with
    the same result: one convolution for all images.

    Args:
        in_channels (`int`): Channels of the input.
        out_channels (`int`): Channels of the output.
        kernel_size (`int`): 1 or 3.
        style_dim (`int`): Width of the style code.
        demodulate (`bool`, defaults to `True`): Whether to bring the outputs back to unit variance.
        upsample (`bool`, defaults to `False`): Double the size: transposed convolution, then the [1, 3, 3, 1] filter.
        activate (`bool`, defaults to `False`): Whether `scaled_leaky_relu` follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        demodulate: bool = True,
        upsample: bool = False,
        activate: bool = False,
    ):
        super().__init__()
        self.affine = EqualizedLinear(style_dim, in_channels, bias_init=1.0)
        nn.init.zeros_(self.affine.weight)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.demodulate = demodulate
        self.upsample = upsample
        self.activate = activate

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, H, W), style (B, style_dim) -> (B, out_channels, H, W), or twice H and W."""
        scale = self.affine(style) * self.scale  # (B, in)
        # The activation's gain g goes into norm and bias: relu(g * x) = g * relu(x) saves a pass over the data.
        gain = ACTIVATION_GAIN if self.activate else 1.0
        if self.demodulate:
            power = F.linear(scale.square(), self.weight.square().sum(dim=(2, 3)))  # (B, out)
            norm = torch.rsqrt(power + 1e-8) * gain
        else:
            norm = scale.new_full((scale.shape[0], self.weight.shape[0]), gain)
        x = (self.scale_weights if x.shape[0] == 1 else self.scale_activations)(x, scale, norm, self.bias * gain)
        # In place: nothing before it needs its input for a gradient.
        return F.leaky_relu_(x, LEAKY_SLOPE) if self.activate else x

    def scale_weights(self, x, scale, norm, bias) -> torch.Tensor:
        """For a batch of one: scale (1, in) and norm (1, out) go into the weights."""
        factors = torch.outer(norm[0], scale[0])  # a small product first: one pass over the weights instead of two
        return self.convolve(x, self.weight * factors[:, :, None, None], bias)

    def scale_activations(self, x, scale, norm, bias) -> torch.Tensor:
        """For any batch: scale (B, in) goes into the input, norm (B, out) into the output."""
        x = self.convolve(x * scale[:, :, None, None], self.weight)
        bias, norm = (values.to(x.dtype) for values in (bias, norm))  # autocast must not widen the activations
        return torch.addcmul(bias[:, None, None], x, norm[:, :, None, None])

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The convolution alone, with the filter where it doubles the size."""
        if not self.upsample:
            return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # 2H + 1
        return filter_2d(x, gain=4.0, bias=None if bias is None else bias.to(x.dtype))  # 2H


class SynthesisBlock(nn.Module):
    """
    One resolution of the decoder: an up-convolution where the resolution doubles, `num_layers` times two convolutions,
    and an RGB output. Of more than two convolutions, each pair that keeps the width is residual; a sum is divided by
    the square root of two, as in StyleGAN2's residual discriminator, so that it grows slowly with the number of pairs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        style_dim: int,
        upsample: bool,
        num_layers: int = 1,
    ):
        super().__init__()
        widths = [out_channels if upsample else in_channels] + 2 * num_layers * [out_channels]
        self.up_conv = (
            ModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample=True, activate=True)
            if upsample
            else None
        )
        self.convs = nn.ModuleList(
            ModulatedConv2d(fan_in, fan_out, 3, style_dim, activate=True)
            for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.to_rgb = ModulatedConv2d(out_channels, image_channels, 1, style_dim, demodulate=False)

    def forward(self, x: torch.Tensor, image: torch.Tensor | None, style: torch.Tensor):
        """x (B, in, H, W), image so far or `None`, style -> features and image at this block's resolution."""
        if self.up_conv is not None:
            x = self.up_conv(x, style)
        for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
            start, x = x, second(first(x, style), style)
            if len(self.convs) > 2 and start.shape[1] == x.shape[1]:
                x = (start + x) * 0.5**0.5
        rgb = self.to_rgb(x, style)
        return x, rgb if image is None else rgb + upsample_2d(image)


class StyleDecoder(nn.Module):
    r"""
    Feature block and style code to image: StyleGAN2's synthesis network with the skip architecture, no noise inputs
    (Sec. 3.3).

    Args:
        in_channels (`int`): Channels of the feature block C_d.
        out_channels (`int`, defaults to 3): Channels of the image.
        block_out_channels (`tuple[int]`, defaults to `(512, 256, 128)`):
            Width of each resolution; the first works at the resolution of the feature block, each other doubles it.
        style_dim (`int`, defaults to 512): Width of the style code.
        layers_per_block (`tuple[int]`, *optional*): Pairs of convolutions at each resolution, 1 by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (512, 256, 128),
        style_dim: int = 512,
        layers_per_block: tuple[int, ...] | None = None,
    ):
        super().__init__()
        widths, layers = (in_channels, *block_out_channels), layers_per_block or (1,) * len(block_out_channels)
        self.blocks = nn.ModuleList(
            SynthesisBlock(fan_in, fan_out, out_channels, style_dim, index > 0, num_layers)
            for index, (fan_in, fan_out, num_layers) in enumerate(zip(widths[:-1], widths[1:], layers, strict=True))
        )
        self.gradient_checkpointing = False

    def forward(self, feature_block: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """
        Feature block (B, C_d, H_d, W_d), style (B, style_dim) -> image (B, out_channels, H, W), nominally in [-1, 1],
        not clipped.
        """
        # Channels last: a tenth less time on a CPU, and the layout of half precision convolutions on a GPU.
        x, image = feature_block.contiguous(memory_format=torch.channels_last), None
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, image = self._gradient_checkpointing_func(block, x, image, style)
            else:
                x, image = block(x, image, style)
        return image
