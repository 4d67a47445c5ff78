"""The discriminator: shapes, parts against naive versions, R1's second derivative, saving."""

import math
import os
import re

import pytest
import torch
import torch.nn.functional as F

from brics_diffusers import BricsDiscriminator, PatchDiscriminator
from brics_diffusers.models.discriminator import DiscriminatorBlock, EqualizedConv2d, minibatch_stddev
from brics_diffusers.training_utils.losses import gradient_penalty


SMALL = {"base_channels": 64, "max_channels": 8}

# Sums of at most a hundred products of order 1.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return BricsDiscriminator(sample_size=8, **SMALL)


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def naive_blur(x, padding):
    taps = torch.tensor([1, 3, 3, 1], dtype=x.dtype) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (padding,) * 4), kernel, groups=x.shape[1])


class TestShapes:
    @pytest.mark.parametrize("sample_size", [8, 64])
    @pytest.mark.parametrize("batch_size", [1, 3, 4])
    def test_one_logit_an_image(self, sample_size, batch_size):
        model = BricsDiscriminator(sample_size=sample_size, **SMALL)
        logits = model(torch.rand(batch_size, 3, sample_size, sample_size) * 2 - 1)
        assert logits.shape == (batch_size,)
        assert logits.isfinite().all()
        assert len(model.blocks) == math.log2(sample_size) - 2

    def test_widths(self):
        with torch.device("meta"):
            model = BricsDiscriminator()
        widths = [block.conv_down.weight.shape[0] for block in model.blocks]
        assert model.conv_in.weight.shape[:2] == (64, 3)
        assert widths == [128, 256, 512, 512, 512, 512]
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == 24_001_089  # as StyleGAN2-ADA's at 256 x 256 with channel_base 16384

    def test_other_channels(self):
        assert BricsDiscriminator(in_channels=1, sample_size=8, **SMALL)(torch.zeros(2, 1, 8, 8)).shape == (2,)


class TestParts:
    @pytest.mark.parametrize("kernel_size, padding", [(1, 1), (3, 2)])
    def test_downsampling_convolution(self, kernel_size, padding):
        conv = EqualizedConv2d(4, 5, kernel_size, downsample=True).double()
        conv.bias.data.normal_()
        x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
        # Filter at full resolution, convolve at full resolution, keep every other pixel.
        weight = conv.weight / math.sqrt(4 * kernel_size**2)
        expected = F.conv2d(naive_blur(x, padding), weight, conv.bias)[:, :, ::2, ::2]
        assert expected.shape == (2, 5, 4, 3)
        torch.testing.assert_close(conv(x), expected, **EXACT)

    @pytest.mark.parametrize("kernel_size", [1, 3])
    def test_convolution(self, kernel_size):
        conv = EqualizedConv2d(4, 5, kernel_size).double()
        x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
        expected = F.conv2d(x, conv.weight / math.sqrt(4 * kernel_size**2), padding=kernel_size // 2)
        torch.testing.assert_close(conv(x), expected, **EXACT)

    def test_block_keeps_variance(self):
        torch.manual_seed(0)
        x = torch.randn(8, 32, 16, 16)
        # White noise loses most of its power in the low-pass filter; a constant per image and channel does not.
        x = x.mean(dim=(2, 3), keepdim=True).mul(16).expand(-1, -1, 16, 16)
        ratio = DiscriminatorBlock(32, 32)(x)[:, :, 3:-3, 3:-3].var() / x.var()
        assert 0.4 < ratio < 2.5  # a few hundred random weights and leaky ReLUs scatter it

    @pytest.mark.parametrize("batch_size, group_size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4)])
    def test_minibatch_stddev(self, batch_size, group_size):
        x = torch.randn(batch_size, 3, 2, 5, dtype=torch.float64)
        result = minibatch_stddev(x)
        assert result.shape == (batch_size, 4, 2, 5)
        assert torch.equal(result[:, :3], x)
        for image in range(batch_size):
            start = image // group_size * group_size
            group = x[start : start + group_size]  # neighbours
            variance = group.sub(group.mean(dim=0)).square().mean(dim=0)
            expected = (variance + 1e-8).sqrt().mean()
            torch.testing.assert_close(result[image, 3], expected.expand(2, 5), **EXACT)

    def test_group_size_is_configured(self):
        torch.manual_seed(0)
        model = BricsDiscriminator(sample_size=8, stddev_group_size=2, **SMALL)
        images = torch.rand(4, 3, 8, 8)
        # Pairs are groups of their own, so the batch can be split there; sums of float32 in another order.
        parts = torch.cat([model(pair) for pair in images.split(2)])
        torch.testing.assert_close(model(images), parts, rtol=1e-4, atol=1e-4)

    def test_minibatch_stddev_sees_collapse(self):
        identical = torch.randn(1, 3, 4, 4).expand(4, -1, -1, -1)
        assert minibatch_stddev(identical)[:, -1].max() < 1e-3
        assert minibatch_stddev(torch.randn(4, 3, 4, 4))[:, -1].min() > 0.5

    @pytest.mark.parametrize("batch_size", [1, 4])
    @pytest.mark.parametrize(
        "dtype",
        [
            torch.float16,
            torch.bfloat16,
            torch.float32,
        ],
    )
    def test_minibatch_stddev_of_equal_images_has_finite_gradients(self, dtype, batch_size):
        x = torch.ones(batch_size, 3, 4, 4, dtype=dtype, requires_grad=True)
        gradient = torch.autograd.grad(minibatch_stddev(x)[:, -1].sum(), x)[0]
        assert gradient.isfinite().all()


class TestGradients:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_r1_double_backward(self, discriminator, batch_size):
        images = (torch.rand(batch_size, 3, 8, 8) * 2 - 1).requires_grad_()
        gradient = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)[0]
        penalty = gradient.square().sum(dim=(1, 2, 3)).mean()
        penalty.backward()
        assert penalty > 0 and penalty.isfinite()
        for name, parameter in discriminator.named_parameters():
            if parameter.grad is None:  # the last bias only shifts the logits
                assert name == "linear_out.bias"
                continue
            assert parameter.grad.isfinite().all(), name
            if name.endswith("weight"):
                assert parameter.grad.abs().max() > 0, name

    def test_r1_gradient_by_finite_differences(self, discriminator):
        model = discriminator.double()
        images = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()

        def penalty():
            gradient = torch.autograd.grad(model(images).sum(), images, create_graph=True)[0]
            return gradient.square().sum()

        weight = model.blocks[0].conv_down.weight
        exact = torch.autograd.grad(penalty(), weight)[0][0, 0, 1, 1].item()
        step, values = 1e-6, []
        for sign in (1, -1):
            weight.data[0, 0, 1, 1] += sign * step
            values.append(penalty().item())
            weight.data[0, 0, 1, 1] -= sign * step
        # Central differences: rounding 1e-16 / 1e-6 of penalties of order 1, if no leaky ReLU changes sign.
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(exact, rel=1e-5, abs=1e-8)

    def test_every_parameter_learns(self, discriminator):
        discriminator(torch.rand(4, 3, 8, 8)).square().sum().backward()
        for name, parameter in discriminator.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


class TestSaving:
    def test_round_trip(self, discriminator, tmp_path):
        discriminator.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
        loaded = BricsDiscriminator.from_pretrained(tmp_path)
        assert public(loaded.config) == public(discriminator.config)
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(loaded(images), discriminator.eval()(images))


class TestErrors:
    @pytest.mark.parametrize(
        ("sample_size", "message"),
        [
            (0, "give a positive number of pixels"),
            *((size, "the discriminator needs a power of two of at least 8") for size in (4, 12, 96)),
            ((16, 18), "the discriminator needs a longer side that is a multiple of 4"),
        ],
    )
    def test_config(self, sample_size, message):
        with pytest.raises(ValueError, match=re.escape(f"sample_size is {sample_size}; {message}")):
            BricsDiscriminator(sample_size=sample_size)

    @pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 3, 8, 4), (1, 1, 8, 8)])
    def test_wrong_size(self, discriminator, shape):
        with pytest.raises(ValueError, match=r"expected \(batch, 3, 8, 8\)"):
            discriminator(torch.zeros(shape))

    def test_no_batch_axis(self, discriminator):
        with pytest.raises(ValueError, match=r"expected \(batch, 3, 8, 8\)"):
            discriminator(torch.zeros(3, 8, 8))


class TestPatches:
    @pytest.mark.parametrize(("num_layers", "field"), [(1, 12), (2, 26), (3, 54)])
    def test_a_logit_sees_a_patch(self, num_layers, field):
        model = PatchDiscriminator(base_channels=4, num_layers=num_layers)
        images = torch.rand(2, 3, 64, 96, requires_grad=True)
        logits = model(images)
        assert logits.shape == (2, 64 // 2**num_layers, 96 // 2**num_layers)
        row, column = (side // 2 for side in logits.shape[1:])
        (gradient,) = torch.autograd.grad(logits[0, row, column], images)
        seen = gradient[0].abs().sum(dim=0).nonzero()
        assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [field, field]
        assert not gradient[1].any()

    def test_other_channels_and_saving(self, tmp_path):
        model = PatchDiscriminator(in_channels=1, base_channels=4)
        model.save_pretrained(tmp_path)
        images = torch.rand(2, 1, 16, 16)
        assert torch.equal(PatchDiscriminator.from_pretrained(tmp_path)(images), model(images))

    def test_r1_is_that_of_the_mean_over_patches(self):
        model = PatchDiscriminator(base_channels=4)
        images = torch.rand(3, 3, 16, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(images).mean(dim=(1, 2)).sum(), images)
        expected = 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
        torch.testing.assert_close(gradient_penalty(images, model(images)), expected)
