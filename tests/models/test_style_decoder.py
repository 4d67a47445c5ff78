"""The style decoder against explicit modulation of weights, sample by sample, and naive filtering."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from brics_diffusers.models.decoders.style_decoder import (
    ModulatedConv2d,
    StyleDecoder,
    SynthesisBlock,
    filter_2d,
    upsample_2d,
)


# Sums of at most a few hundred products of order 1.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def randomize(module: torch.nn.Module, seed: int = 0):
    """Makes every parameter count, biases too; weights keep their unit variance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def naive_filter(x, gain, padding, stride=1):
    """Sum of 16 shifted copies; `padding` is (before, after)."""
    x = F.pad(x, (*padding, *padding))
    height, width = (size - 3 for size in x.shape[2:])
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    total = sum(gain * taps[i] * taps[j] * x[:, :, i : i + height, j : j + width] for i in range(4) for j in range(4))
    return total[:, :, ::stride, ::stride]


def insert_zeros(x):
    result = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    result[:, :, ::2, ::2] = x
    return result


def naive_upsample(x):
    # As many zeros in front as make the result 2H wide with its first pixel 1/4 in front of the first input pixel.
    return naive_filter(insert_zeros(x), gain=4, padding=(2, 1))


def reference_conv(conv: ModulatedConv2d, x, style):
    """Modulates and demodulates the weights of each sample (StyleGAN2, Eq. 1-3)."""
    outputs = []
    for image, code in zip(x, style, strict=True):
        affine = conv.affine.weight / math.sqrt(code.shape[0])
        scale = affine @ code + conv.affine.bias
        fan_in = conv.weight[0].numel()
        weight = conv.weight / math.sqrt(fan_in) * scale[None, :, None, None]
        if conv.demodulate:
            weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if conv.upsample:
            # A transposed convolution spreads the kernel around each pixel: convolution with the flipped kernel.
            spread = F.pad(insert_zeros(image[None]), (2, 1, 2, 1))
            output = naive_filter(F.conv2d(spread, weight.flip(2, 3)), gain=4, padding=(1, 1))
        else:
            output = F.conv2d(image[None], weight, padding=(weight.shape[-1] - 1) // 2)
        outputs.append(output + conv.bias[None, :, None, None])
    return torch.cat(outputs)


class TestFilters:
    @pytest.mark.parametrize("padding, stride", [(0, 1), (1, 1), (2, 1), (1, 2), (2, 2)])
    def test_filter(self, padding, stride):
        x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
        expected = naive_filter(x, 1.7, (padding, padding), stride)
        torch.testing.assert_close(filter_2d(x, 1.7, padding, stride), expected, **EXACT)

    def test_bias_is_added_to_the_result(self):
        x, bias = torch.randn(2, 3, 6, 9, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        x, bias = x.requires_grad_(), bias.requires_grad_()
        actual, expected = filter_2d(x, 1.7, bias=bias), naive_filter(x, 1.7, (1, 1)) + bias[:, None, None]
        torch.testing.assert_close(actual, expected, **EXACT)
        upstream = torch.randn_like(expected)
        gradients = [torch.autograd.grad((y * upstream).sum(), (x, bias)) for y in (actual, expected)]
        torch.testing.assert_close(*gradients, **EXACT)

    @pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
    def test_upsample(self, size):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert upsample_2d(x).shape == (2, 3, 2 * size[0], 2 * size[1])
        torch.testing.assert_close(upsample_2d(x), naive_upsample(x), **EXACT)

    def test_constant_stays_constant_in_the_interior(self):
        x = torch.full((1, 2, 5, 6), 3.0, dtype=torch.float64)
        result = upsample_2d(x)
        torch.testing.assert_close(result[:, :, 1:-1, 1:-1], torch.full_like(result[:, :, 1:-1, 1:-1], 3.0), **EXACT)
        assert result[0, 0, 0, 2].item() == pytest.approx(3 * 0.75)  # zeros beyond the border

    def test_upsampling_a_ramp_keeps_pixel_centers(self):
        # Input pixel i covers outputs 2i and 2i + 1, whose centres are at i -+ 1/4: no shift by half a pixel.
        ramp = torch.arange(6, dtype=torch.float64).expand(1, 1, 6, 6)
        expected = (torch.arange(12, dtype=torch.float64) + 0.5) / 2 - 0.5
        torch.testing.assert_close(upsample_2d(ramp)[0, 0, 5, 1:-1], expected[1:-1], **EXACT)


class TestModulatedConv2d:
    @pytest.mark.parametrize("kernel_size, upsample", [(1, False), (3, False), (3, True)])
    @pytest.mark.parametrize("demodulate", [True, False])
    @pytest.mark.parametrize("batch_size", [1, 3])  # weights are scaled, or activations
    def test_values_and_gradients(self, kernel_size, upsample, demodulate, batch_size):
        conv = randomize(ModulatedConv2d(4, 5, kernel_size, 6, demodulate, upsample).double())
        x = torch.randn(batch_size, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        style = torch.randn(batch_size, 6, dtype=torch.float64, requires_grad=True)
        actual, expected = conv(x, style), reference_conv(conv, x, style)
        assert actual.shape == (batch_size, 5, 3 * (1 + upsample), 5 * (1 + upsample))
        torch.testing.assert_close(actual, expected, **EXACT)
        upstream = torch.randn_like(expected)
        inputs = [x, style, *conv.parameters()]
        gradients = [torch.autograd.grad((y * upstream).sum(), inputs) for y in (actual, expected)]
        torch.testing.assert_close(*gradients, **EXACT)

    @pytest.mark.parametrize("style_scale", [1e-2, 1, 1e2])
    def test_demodulation_keeps_unit_variance(self, style_scale):
        torch.manual_seed(0)
        conv = ModulatedConv2d(32, 32, 3, 8)
        torch.nn.init.normal_(conv.affine.weight)
        x = torch.randn(4, 32, 20, 20)
        output = conv(x, style_scale * torch.randn(4, 8))[:, :, 1:-1, 1:-1]  # at the border some inputs are zeros
        # 32 channels of 324 correlated pixels estimate the variance of an image within a few per cent.
        assert output.var(dim=(1, 2, 3)).sub(1).abs().max() < 0.1

    def test_initial_affine_leaves_inputs_alone(self):
        affine, style = ModulatedConv2d(4, 5, 3, 6).affine, torch.randn(2, 6)
        assert torch.equal(affine(style), torch.ones(2, 4))
        affine(style).sum().backward()
        assert affine.weight.grad.abs().min() > 0  # and learns not to


class TestBlock:
    @pytest.mark.parametrize("upsample", [False, True])
    @pytest.mark.parametrize("has_image", [False, True])
    @pytest.mark.parametrize("num_layers", [1, 3])
    def test_values(self, upsample, has_image, num_layers):
        block = randomize(SynthesisBlock(6, 4, 3, 5, upsample, num_layers).double())
        assert len(block.convs) == 2 * num_layers
        x, style = torch.randn(2, 6, 4, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
        image = torch.randn(2, 3, 4, 6, dtype=torch.float64) if has_image and upsample else None
        expected = x
        for number, conv in enumerate([block.up_conv, *block.convs] if upsample else block.convs, start=not upsample):
            if number % 2:  # the first of a pair
                start = expected
            expected = reference_conv(conv, expected, style)
            expected = torch.where(expected > 0, expected, 0.2 * expected) * math.sqrt(2)
            # The first pair changes the width from 6 to 4, unless the up-convolution has done so.
            if num_layers == 3 and number % 2 == 0 and number > (0 if upsample else 2):
                expected = (start + expected) / math.sqrt(2)
        expected_image = reference_conv(block.to_rgb, expected, style)
        if image is not None:
            expected_image = expected_image + naive_upsample(image)
        # Seven layers of sums over 54 products.
        torch.testing.assert_close(block(x, image, style), (expected, expected_image), rtol=1e-10, atol=1e-10)


class TestStyleDecoder:
    @pytest.mark.parametrize("widths", [(8,), (8, 4), (4, 8, 6)])
    @pytest.mark.parametrize("size", [(4, 4), (3, 5)])
    def test_shapes(self, widths, size):
        decoder = StyleDecoder(6, 2, widths, style_dim=5)
        factor = 2 ** (len(widths) - 1)
        output = decoder(torch.randn(2, 6, *size), torch.randn(2, 5))
        assert output.shape == (2, 2, factor * size[0], factor * size[1])
        assert [block.up_conv is not None for block in decoder.blocks] == [index > 0 for index in range(len(widths))]

    def test_skips_sum_the_upsampled_images(self):
        decoder = randomize(StyleDecoder(6, 3, (8, 4, 4), 5).double())
        feature_block, style = torch.randn(2, 6, 4, 4).double(), torch.randn(2, 5).double()
        first = decoder.blocks[0](feature_block, None, style)[1]
        for block in decoder.blocks[1:]:
            block.to_rgb.weight.data.zero_()
            block.to_rgb.bias.data.zero_()
        torch.testing.assert_close(decoder(feature_block, style), naive_upsample(naive_upsample(first)), **EXACT)

    def test_no_noise(self):
        decoder = StyleDecoder(6, 3, (8, 4), 5).train()
        feature_block, style = torch.randn(1, 6, 4, 4), torch.randn(1, 5)
        assert torch.equal(decoder(feature_block, style), decoder(feature_block, style))

    def test_gradient_checkpointing(self):
        decoder = randomize(StyleDecoder(6, 3, (8, 4), 5).double())
        feature_block, style = torch.randn(2, 6, 4, 4).double().requires_grad_(), torch.randn(2, 5).double()
        inputs = [feature_block, *decoder.parameters()]
        calls = []

        def counted(*arguments):
            calls.append(arguments[0])
            return partial(checkpoint, use_reentrant=False)(*arguments)

        results = []
        for enabled in (False, True):
            decoder.gradient_checkpointing, decoder._gradient_checkpointing_func = enabled, counted
            output = decoder(feature_block, style)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        assert calls == list(decoder.blocks)
        # The same operations run twice; only threads could change an order of summation.
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            decoder(feature_block, style)
        assert len(calls) == 2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        torch.manual_seed(0)
        decoder = StyleDecoder(16, 3, (16, 8), 8)
        feature_block, style = torch.randn(2, 16, 8, 8).to(dtype), torch.randn(2, 8).to(dtype)
        exact = decoder.to(dtype).float()(feature_block.float(), style.float())
        rounded = decoder.to(dtype)(feature_block, style)
        assert rounded.dtype == dtype
        # Five layers in a row that each round a few times to eps: 2^-10 and 2^-7.
        error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 8 * torch.finfo(dtype).eps
