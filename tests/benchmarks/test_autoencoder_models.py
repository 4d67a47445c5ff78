"""AutoencoderKL with BRICS' shortcut and noise, and BRICS with a KL loss, as they are trained by the comparison."""

import autoencoder_models
import pytest
import torch
from autoencoder_models import NoisyAutoencoderKL
from autoencoder_report import noise_curve
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from test_compare_autoencoders import PEER, as_run, make_model

from brics_diffusers.data import load_collection


@pytest.fixture
def images():
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestNoisyAutoencoderKL:
    def test_saving(self, images, tmp_path):
        model = make_model("NoisyAutoencoderKL", relative_noise=0.25).eval()
        model.save_pretrained(tmp_path)
        loaded = NoisyAutoencoderKL.from_pretrained(tmp_path).eval()
        assert loaded.config.relative_noise == 0.25 and loaded.config.sample_size == 32
        with torch.no_grad():
            assert torch.equal(loaded(images).sample, model(images).sample)
        assert torch.equal(loaded.encoder.shortcut.weight, model.encoder.shortcut.weight)

    @torch.no_grad()
    def test_shortcut_is_added_to_the_means_alone(self, images):
        model = make_model("NoisyAutoencoderKL").eval()
        means, log_variances = model.encoder(images).chunk(2, dim=1)
        plain_means, plain_log_variances = Encoder.forward(model.encoder, images).chunk(2, dim=1)
        shortcut = model.encoder.shortcut(images)
        assert shortcut.abs().mean() > 0.1 and torch.equal(means, plain_means + shortcut)
        assert torch.equal(log_variances, plain_log_variances)
        assert torch.equal(model.encode(images).latent_dist.mean, means)

    @torch.no_grad()
    def test_bounded_latents_are_not_drawn(self, images, tmp_path):
        model, plain = (make_model("NoisyAutoencoderKL", bounded=bounded).eval() for bounded in (True, False))
        model.encoder.shortcut.weight.mul_(10)
        plain.load_state_dict(model.state_dict())
        posterior, free = (each.encode(images).latent_dist for each in (model, plain))
        assert free.mean.abs().max() > 3 and posterior.mean.abs().max() <= 2
        assert torch.allclose(posterior.mean, 2 * torch.tanh(free.mean / 2), atol=1e-5)  # of slope 1 at 0
        assert torch.allclose(posterior.sample(), posterior.mean, atol=1e-5)  # e**-15 of them is noise
        model.save_pretrained(tmp_path)
        loaded = NoisyAutoencoderKL.from_pretrained(tmp_path).eval()
        assert torch.equal(autoencoder_models.encode(loaded, images), posterior.mean)

    @torch.no_grad()
    def test_a_decoder_of_other_widths(self, images, tmp_path):
        model = make_model("NoisyAutoencoderKL", decoder_block_out_channels=(16, 8, 24)).eval()
        assert [block.resnets[-1].out_channels for block in model.decoder.up_blocks] == [24, 8, 16]
        assert model.encoder.conv_in.out_channels == PEER["block_out_channels"][0]
        model.save_pretrained(tmp_path)
        loaded = NoisyAutoencoderKL.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(images).sample, model(images).sample)

    @torch.no_grad()
    def test_without_shortcut_and_noise_it_is_an_autoencoder_kl(self, images):
        model = make_model("NoisyAutoencoderKL").eval()
        for parameter in model.encoder.shortcut.parameters():
            parameter.zero_()
        twin = AutoencoderKL(**PEER, use_quant_conv=False).eval()  # the means come from the encoder itself
        missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
        assert not missing and set(unexpected) == {"encoder.shortcut.weight", "encoder.shortcut.bias"}
        assert torch.equal(twin(images).sample, model(images).sample)

    @pytest.mark.parametrize("relative_noise", [0.0, 0.5])
    def test_noise_is_relative_to_the_latents_and_in_training_only(self, images, monkeypatch, relative_noise):
        model, decoded = make_model("NoisyAutoencoderKL", relative_noise=relative_noise), []
        # Means of 100 times their size, and variances of e**-30, the least there is: draws are the means themselves.
        encode, decode = model.encoder.forward, model.decode
        scale = torch.tensor([100.0, 0.0]).repeat_interleave(4).view(1, 8, 1, 1)
        shift = torch.tensor([0.0, -30.0]).repeat_interleave(4).view(1, 8, 1, 1)
        monkeypatch.setattr(model.encoder, "forward", lambda sample: encode(sample) * scale + shift)
        monkeypatch.setattr(model, "decode", lambda latents: decoded.append(latents) or decode(latents))
        with torch.no_grad():
            autoencoder_models.reconstruct(model, images)
            means = autoencoder_models.encode(model, images)
        noise = (decoded[0] - means) / autoencoder_models.latent_deviation(means)
        assert decoded[0].shape == (16, 4, 8, 8)
        # 4,096 draws: a standard error of 1.1%.
        assert noise.std().item() == pytest.approx(relative_noise, rel=0.05, abs=1e-5)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(images).sample, decode(means).sample)


def test_brics_with_a_kl_loss(images, image_folder):
    model = make_model("BricsAutoencoder", regularization="kl")
    sample, regularizer = autoencoder_models.reconstruct(model, images)
    mean, log_variance = model.encoder(images).chunk(2, dim=1)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(images)
    assert regularizer.item() == pytest.approx(1e-4 * kl.item(), rel=1e-4)
    assert not torch.equal(sample, autoencoder_models.reconstruct(model, images)[0])  # codes are drawn
    assert autoencoder_models.VARIANTS["BRICS, KL regularization"].changes == {"regularization": "kl"}
    # The noise of relaxed precision is none of this model's.
    assert noise_curve(as_run(model), load_collection(image_folder))["training_noise"] is None
