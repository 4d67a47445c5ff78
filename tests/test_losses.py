import argparse
import urllib.error

import lpips
import pytest
import torch
import torch.nn.functional as F
import train_autoencoder
from torch import nn

from brics_diffusers import BricsDiscriminator, losses
from brics_diffusers.losses import (
    DiscriminatorLoss,
    adversarial_loss,
    adversarial_ramp,
    denoising_loss,
    discriminator_loss,
    gradient_penalty,
    load_lpips,
    lpips_is_cached,
    reconstruction_loss,
)


class TestReconstructionLoss:
    def test_weights(self):
        sample, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        distances = torch.tensor([0.2, 0.4]).view(2, 1, 1, 1)
        loss, parts = reconstruction_loss(sample, target, 20, 5, lambda a, b: distances)
        mse = ((sample - target) ** 2).mean()
        torch.testing.assert_close(loss, 20 * mse + 5 * 0.3)
        torch.testing.assert_close(parts["mse"], mse)
        torch.testing.assert_close(parts["lpips"], torch.tensor(0.3))

    def test_lpips_has_a_gradient(self):
        metric = load_lpips("alex", pretrained=False)
        sample = torch.rand(1, 3, 64, 64, requires_grad=True)
        loss, _ = reconstruction_loss(sample, torch.zeros(1, 3, 64, 64), 0.0, 5.0, metric)
        loss.backward()
        assert sample.grad.abs().max() > 0
        assert not any(parameter.requires_grad for parameter in metric.parameters())

    def test_missing_weights_are_named(self, monkeypatch, tmp_path):
        def fail(*_, **__):
            raise urllib.error.URLError("no network")

        monkeypatch.setattr(lpips, "LPIPS", fail)
        monkeypatch.setattr(losses, "is_offline_mode", lambda: False)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        assert not lpips_is_cached("vgg")
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
        assert lpips_is_cached("alex") and not lpips_is_cached("vgg")
        with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth.*no network.*checkpoints.*--lpips_weight 0"):
            load_lpips("vgg")

    def test_nothing_is_downloaded_offline(self, monkeypatch, tmp_path):
        monkeypatch.setattr(lpips, "LPIPS", pytest.fail)
        monkeypatch.setattr(losses, "is_offline_mode", lambda: True)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="vgg16.*HF_HUB_OFFLINE is set.*checkpoints/, or do this instead"):
            load_lpips("vgg", remedy="do this instead")


def test_adversarial_losses():
    logits = torch.tensor([-1.0, 2.0])
    expected = -torch.log(torch.sigmoid(logits)).mean()
    torch.testing.assert_close(adversarial_loss(logits), expected)
    torch.testing.assert_close(discriminator_loss(logits, -logits), 2 * expected)


def test_gradient_penalty_of_a_linear_discriminator():
    weight = torch.randn(3, 4, 4)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = gradient_penalty(images, (images * weight).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())


class TestDiscriminatorLoss:
    @pytest.fixture
    def critic(self):
        torch.manual_seed(0)
        return DiscriminatorLoss(BricsDiscriminator(sample_size=8, base_channels=64, max_channels=8), 4.0, 16)

    def test_penalty_has_its_weight_and_a_gradient(self, critic):
        real, fake = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
        plain, _ = critic(real, fake, penalize=False)
        loss, parts = critic(real, fake, penalize=True)
        torch.testing.assert_close(loss - plain, 4.0 * 16 * parts["r1"])
        critic.zero_grad()
        (loss - plain).backward()
        assert critic.discriminator.conv_out.weight.grad.abs().max() > 0

    def test_penalty_is_float32_under_autocast(self, critic):
        real, fake = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
        _, exact = critic(real, fake, penalize=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, parts = critic(real, fake, penalize=True)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(parts["r1"], exact["r1"], rtol=1e-6, atol=0)


def test_denoising_loss():
    prediction, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(denoising_loss(prediction, target), F.mse_loss(prediction, target))
    weights = torch.tensor([1.0, 0.0, 0.0])
    expected = F.mse_loss(prediction[0], target[0]) / 3
    torch.testing.assert_close(denoising_loss(prediction, target, weights), expected)


def test_adversarial_ramp():
    assert [adversarial_ramp(step, 10, 4) for step in (0, 9, 10, 11, 13, 99)] == [0, 0, 0.25, 0.5, 1, 1]
    assert adversarial_ramp(0, 0, 0) == 1


def test_real_lpips_modules_take_images():
    assert isinstance(load_lpips("squeeze", pretrained=False), nn.Module)


def test_damaged_lpips_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match="squeezenet1_1-b8a52dc0.pth, which is damaged .*put that file into"):
        load_lpips("squeeze")
    args = argparse.Namespace(lpips_weight=0, lpips_network="squeeze")
    assert train_autoencoder.build_lpips(args) is None  # in validation alone it is no reason to stop
