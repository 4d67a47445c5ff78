"""Codes moved towards noise in training; relaxed precision is tested beside the rest of the autoencoder."""

import json

import pytest
import torch
from small_autoencoders import fix_logits, generator, make_model

from brics_diffusers import BricsAutoencoder
from brics_diffusers.models.regularization import interpolate_with_noise


@pytest.mark.parametrize("gamma", [0.1, 1.0, 3.0])
def test_every_image_is_moved_by_one_share_of_the_way(gamma):
    images = 64
    codes = torch.rand(1, 4, 64, 64, generator=generator()).expand(images, -1, -1, -1)
    perturbed = interpolate_with_noise(codes, gamma, generator(1))
    # The same by a direct formula, from the same numbers.
    again = generator(1)
    shares = torch.distributions.Normal(0, 1).cdf(torch.randn(images, 1, 1, 1, generator=again))
    u, noise = 2 * (codes - 0.5), torch.randn(codes.shape, generator=again)
    expected = (((1 - shares) * u + shares * gamma * noise) / 2 + 0.5).clip(0, 1)
    torch.testing.assert_close(perturbed, expected, rtol=0, atol=1e-6)
    assert perturbed.min() >= 0 and perturbed.max() <= 1


def test_shares_and_noise_have_their_distributions():
    images, gamma = 4096, 0.1  # so small that nothing is clipped: |u| is 0.4, and noise 0.1
    codes = torch.tensor([0.3, 0.7]).view(1, 1, 1, 2).expand(images, 8, 8, 2)
    u = 2 * (interpolate_with_noise(codes, gamma, generator()) - 0.5)
    half = (u[..., 1] - u[..., 0]).mean(dim=(1, 2)) / 2  # (1 - t) 0.4, but for noise of a few thousandths
    shares = 1 - half / 0.4
    # Of 4,096 draws from U(0, 1): the mean within 0.0045, the deviation within 0.002 (one sigma).
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert (shares < 0.25).float().mean().item() == pytest.approx(0.25, abs=0.03)
    # Around an image's mean the deviation is t gamma.
    deviation = u[..., 0].flatten(1).std(dim=1)
    slope = (deviation * shares).sum() / shares.square().sum()
    assert slope.item() == pytest.approx(gamma, rel=0.05)
    assert torch.corrcoef(torch.stack([deviation, shares]))[0, 1] > 0.9


def test_it_is_for_training_only(monkeypatch):
    model = make_model(regularization="interpolate", interpolation_gamma=0.5).train()
    fix_logits(model, monkeypatch, torch.linspace(-3, 3, 4 * 16 * 16).view(1, 4, 16, 16))
    images = torch.zeros(2, 3, 64, 64)
    codes = model.encode(images, generator=generator(3)).key_codes
    exact = model.eval().encode(images, generator=generator(3)).key_codes
    assert torch.equal(exact, torch.sigmoid(model.encoder(images)))
    assert torch.equal(codes, interpolate_with_noise(exact, 0.5, generator(3))) and not torch.equal(codes, exact)


def test_gradients_shrink_with_the_share():
    codes = torch.full((16, 2, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(interpolate_with_noise(codes, 0.1, generator()).sum(), codes)
    first = gradient[:, :1, :1, :1]
    assert torch.equal(gradient, first.expand_as(gradient)) and 0 < first.min() < first.max() < 1


def test_configs_from_before_it_load(tmp_path):
    make_model(interpolation_gamma=2.0).save_pretrained(tmp_path)
    assert BricsAutoencoder.from_pretrained(tmp_path).config.interpolation_gamma == 2.0
    config = json.loads((tmp_path / "config.json").read_text())
    del config["interpolation_gamma"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = BricsAutoencoder.from_pretrained(tmp_path)
    assert loaded.config.interpolation_gamma == 1.0 and loaded.config.regularization == "noise"
