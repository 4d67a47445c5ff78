"""Statistics of key codes: noise behind a sigmoid against drawn codes, and that batches do not matter."""

import pytest
import torch
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder
from brics_diffusers.analysis.code_statistics import key_code_statistics, sigmoid_precision


class TestSigmoidPrecision:
    def test_equals_monte_carlo(self):
        mean = torch.tensor([-6.0, -1.0, 0.0, 2.0, 5.0, 0.0])
        std = torch.tensor([0.5, 0.01, 1.0, 3.0, 0.2, 50.0])
        noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.sigmoid(mean + std * noise).std(dim=0)
        # The standard error of a standard deviation from 200,000 draws is 0.2% for a Gaussian, more with heavy tails.
        torch.testing.assert_close(sigmoid_precision(mean, std), expected, rtol=0.01, atol=0)

    def test_small_deviations_are_linear(self):
        mean, std = torch.tensor([-3.0, 0.0, 1.0]), torch.full((3,), 1e-7)
        slope = torch.sigmoid(mean.double()) * torch.sigmoid(-mean.double())
        torch.testing.assert_close(sigmoid_precision(mean, std), slope * std.double(), rtol=1e-6, atol=0)

    def test_step(self):
        assert sigmoid_precision(torch.tensor(0.0), torch.tensor(1e4)).item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("regularization", ["noise", "kl"])
def test_statistics_do_not_depend_on_batches(regularization):
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER, regularization=regularization).eval()
    autoencoder.encoder.conv_out.weight.data *= 8  # some codes reach the edges
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    statistics = key_code_statistics(autoencoder, [(images[:2], None), (images[2:], None)])
    codes = autoencoder.encode(images).key_codes.detach().transpose(0, 1).flatten(1).double()  # (C_z, n)
    near_zero, near_one = codes <= 1 / 256, codes >= 1 - 1 / 256
    assert near_zero.any() and near_one.any() and statistics["relaxed_precision"] == 1 / 64
    for channel, row in enumerate(statistics["channels"]):
        assert row["mean"] == pytest.approx(codes[channel].mean().item(), abs=1e-6)
        assert row["std"] == pytest.approx(codes[channel].std(correction=0).item(), abs=1e-6)
        assert row["near_zero"] == pytest.approx(near_zero[channel].double().mean().item())
        assert row["near_one"] == pytest.approx(near_one[channel].double().mean().item())
        expected = torch.histogram(codes[channel], bins=256, range=(0, 1)).hist
        assert (torch.tensor(statistics["histogram"][channel]) - expected).abs().sum() <= 4  # rounding at bin edges


def test_precision_equals_that_of_codes_drawn_in_training():
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER, regularization="kl")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    statistics = key_code_statistics(autoencoder.eval(), [(images, None)])
    with torch.no_grad():
        drawn = torch.cat([autoencoder.train().encode(images).key_codes for _ in range(400)])
    sigma = drawn.double().std(dim=0).flatten(1)  # (C_z, H_z * W_z), each from 400 draws
    for row, expected in zip(statistics["channels"], sigma.mean(dim=1).tolist(), strict=True):
        assert row["precision"] == pytest.approx(expected, rel=0.02)
    precision = statistics["precision"]
    assert precision["mean"] == pytest.approx(sigma.mean().item(), rel=0.02)
    assert precision["min"] < precision["mean"] < precision["max"] and precision["above_relaxed"] == 1
    assert torch.tensor(precision["histogram"]).sum() == 4 * 8 * 8
