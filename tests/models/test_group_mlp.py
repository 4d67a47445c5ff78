"""Per-group MLPs against loops over groups and samples that modulate the weights themselves."""

import math

import pytest
import torch

from brics_diffusers.models.decoders.group_mlp import GroupMLP, ModulatedGroupLinear


# Sums of at most a few dozen terms of order 1.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def randomize(module: torch.nn.Module, seed: int = 0):
    """Makes every parameter count, biases too; weights keep their unit variance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def reference_mapping(mapping, group, vector):
    """Two equalized linear layers with a leaky ReLU between, one group, one sample: (in,) -> (out,)."""
    first, _, second = mapping
    for index, layer in enumerate((first, second)):
        weight = layer.weight[group] / math.sqrt(layer.weight.shape[-1])
        vector = weight @ vector + layer.bias[group, :, 0]
        if index == 0:
            vector = torch.where(vector > 0, vector, 0.2 * vector)
    return vector


def reference_layer(layer, group, x, modulation):
    """StyleGAN2's modulated and demodulated linear layer, one group, one sample: (in, P) -> (out, P)."""
    affine = layer.affine.weight[group] / math.sqrt(modulation.shape[0])
    style = affine @ modulation + layer.affine.bias[group, :, 0]
    weight = layer.weight[group] / math.sqrt(x.shape[0]) * style  # scales the inputs
    weight = weight / (weight.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
    return weight @ x + layer.bias[group, :, 0]


def reference_mlp(mlp, features):
    num_groups, _, batch_size, _ = features.shape
    blocks, styles = [], []
    for sample in range(batch_size):
        block, style = [], []
        for group in range(num_groups):
            x = features[group, :, sample]
            mean = x.mean(dim=1)
            mean = mean / (mean.square().mean() + 1e-20).sqrt()
            modulation = reference_mapping(mlp.modulation, group, mean)
            for index, layer in enumerate(mlp.layers):
                x = reference_layer(layer, group, x, modulation)
                if index < len(mlp.layers) - 1:
                    x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
            block.append(x)
            if mlp.style is not None:
                style.append(reference_mapping(mlp.style, group, mean))
        blocks.append(torch.cat(block))
        styles.append(torch.cat(style) if style else None)
    return torch.stack(blocks), None if mlp.style is None else torch.stack(styles)


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for output in outputs:
        loss = loss + (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
    return torch.autograd.grad(loss, inputs)


class TestParts:
    def test_demodulation_keeps_unit_variance_whatever_the_style(self):
        torch.manual_seed(0)
        layer = ModulatedGroupLinear(2, 64, 64, 8).double()
        torch.nn.init.normal_(layer.affine.weight)
        x = torch.randn(2, 3, 64, 500, dtype=torch.float64)
        for scale in (0.1, 1, 100):
            output = layer(x, scale * torch.randn(2, 8, 3, dtype=torch.float64))
            # Each of the 64 outputs of a group and sample has variance 1; 500 points estimate it within 6%, and their
            # mean over 64 channels within 1% were they independent.
            assert output.var(dim=-1).mean(dim=2).sub(1).abs().max() < 0.1

    def test_initial_layer_is_the_same_for_every_style(self):
        layer, x = ModulatedGroupLinear(2, 4, 5, 8), torch.randn(2, 3, 4, 6)
        outputs = [layer(x, style) for style in (torch.zeros(2, 8, 3), torch.randn(2, 8, 3))]
        assert torch.equal(*outputs)


class TestGroupMLP:
    @pytest.mark.parametrize("num_layers", [1, 2, 3])
    @pytest.mark.parametrize("style_dim", [0, 9])
    @pytest.mark.parametrize(
        "dtype, tolerance",
        [
            # Three layers of sums of 8 terms of order 1, gradients up to about 100.
            (torch.float32, {"rtol": 1e-3, "atol": 1e-3}),
            (torch.float64, EXACT),
        ],
    )
    def test_values_and_gradients(self, num_layers, style_dim, dtype, tolerance):
        mlp = randomize(GroupMLP(3, 8, 12, style_dim, num_layers).to(dtype))
        features = torch.randn(3, 8, 2, 5, dtype=dtype, requires_grad=True)
        block, style = mlp(features)
        expected_block, expected_style = reference_mlp(mlp, features)
        assert block.shape == (2, 12, 5)
        torch.testing.assert_close(block, expected_block, **tolerance)
        if style_dim:
            assert style.shape == (2, 9)
            torch.testing.assert_close(style, expected_style, **tolerance)
        else:
            assert style is None and expected_style is None
        inputs = [features, *mlp.parameters()]
        actual = gradients([block] if style is None else [block, style], inputs)
        expected = gradients([expected_block] if style is None else [expected_block, expected_style], inputs)
        torch.testing.assert_close(actual, expected, **tolerance)

    def test_scale_of_features_does_not_reach_the_style_code(self):
        mlp = randomize(GroupMLP(2, 8, 12, 8))
        features = torch.randn(2, 8, 3, 5)
        # The means are divided by their RMS.
        torch.testing.assert_close(mlp(10 * features)[1], mlp(features)[1], rtol=1e-4, atol=1e-4)

    def test_constant_zero_features_are_finite_with_gradients(self):
        mlp = randomize(GroupMLP(2, 8, 12, 8))
        features = torch.zeros(2, 8, 1, 5, requires_grad=True)
        block, style = mlp(features)
        gradient = torch.autograd.grad(block.sum() + style.sum(), features)[0]
        assert all(tensor.isfinite().all() for tensor in (block, style, gradient))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        mlp = GroupMLP(2, 16, 12, 8)
        features = torch.rand(2, 16, 3, 50) * 1e-4  # as at initialisation: their squares vanish in float16
        half = mlp.to(dtype)(features.to(dtype))
        exact = mlp.float()(features.to(dtype).float())
        for rounded, full in zip(half, exact, strict=True):
            assert rounded.dtype == dtype
            # A few layers that each round to eps: 5% of the RMS covers bfloat16's 2^-7.
            error = (rounded.float() - full).square().mean().sqrt() / full.square().mean().sqrt()
            assert error < 0.05

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((3, 8, 10, 9), "feature_channels=10.*3 groups"),
            ((3, 8, 12, 10), "style_dim=10.*3 groups"),
            ((3, 8, 12, 9, 0), "mlp_layers=0"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            GroupMLP(*arguments)
