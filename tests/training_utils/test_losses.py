"""Losses of both stages: weights, gradients, the gradient penalty, the ramp."""

import pytest
import torch
import torch.nn.functional as F

from brics_diffusers import BricsDiscriminator
from brics_diffusers.metrics.perceptual import load_lpips
from brics_diffusers.training_utils.losses import (
    DiscriminatorLoss,
    adversarial_loss,
    adversarial_ramp,
    denoising_loss,
    discriminator_loss,
    gradient_penalty,
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

    def test_compiled_with_the_penalty_left_out(self, critic):
        images, values = (torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)), []
        # The part of inductor that can't be differentiated twice, without what makes code.
        for model in (critic, torch.compile(critic, backend="aot_eager")):
            critic.zero_grad()
            loss, parts = model(*images, penalize=True)
            loss.backward()
            values.append([loss, parts["r1"], *(parameter.grad.clone() for parameter in critic.parameters())])
        torch.testing.assert_close(values[1], values[0])


def test_denoising_loss():
    prediction, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(denoising_loss(prediction, target), F.mse_loss(prediction, target))
    weights = torch.tensor([1.0, 0.0, 0.0])
    expected = F.mse_loss(prediction[0], target[0]) / 3
    torch.testing.assert_close(denoising_loss(prediction, target, weights), expected)


def test_adversarial_ramp():
    assert [adversarial_ramp(step, 10, 4) for step in (0, 9, 10, 11, 13, 99)] == [0, 0, 0.25, 0.5, 1, 1]
    assert adversarial_ramp(0, 0, 0) == 1
