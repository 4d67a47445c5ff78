"""The convolution from the image to the key code's logits, and models of before there was one."""

import json

import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from safetensors.torch import load_file
from small_models import AUTOENCODER, ROOT
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from brics_diffusers import BricsAutoencoder


OLD_MODEL = ROOT / "tests/models/data/autoencoder_without_shortcut"
# Means over the quarters of its reconstruction of `disc`, red, green and blue, and of its key code's four channels,
# computed by the version that saved it. Kernels of AVX-512, AVX2 and without either agree to 3e-7.
OLD_SAMPLE = [0.510964, 0.731816, 0.520008, 0.738238]
OLD_SAMPLE += [0.509437, 0.509431, 0.735504, 0.726864]
OLD_SAMPLE += [0.741294, 0.498652, 0.734779, 0.513558]
OLD_CODES = [0.570117, 0.587519, 0.649696, 0.692280]
OLD_CODES += [0.447583, 0.445460, 0.515981, 0.512544]
OLD_CODES += [0.563329, 0.563339, 0.574995, 0.590621]
OLD_CODES += [0.644815, 0.540959, 0.679426, 0.570790]


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def disc():
    """A disc of all colours on white, (1, 3, 64, 64)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    return torch.where(x.square() + y.square() < 0.5, torch.stack([x, y, -x]), torch.ones(3, 64, 64))[None]


def make_model(**config) -> BricsAutoencoder:
    torch.manual_seed(0)
    return BricsAutoencoder(**AUTOENCODER | config).eval()


@torch.no_grad()
def codes_of(model, images):
    return model.encode(images).key_codes


@torch.no_grad()
def test_it_adds_a_product_with_every_patch_to_the_logits(images):
    model = make_model()
    weight, bias = model.encoder.shortcut.weight, model.encoder.shortcut.bias
    assert weight.shape == (4, 3, 4, 4)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, 3, 8, 8, 4, 4)
    expected = torch.einsum("bcyxij,kcij->bkyx", patches, weight) + bias.view(-1, 1, 1)
    added = model.encoder(images) - Encoder.forward(model.encoder, images)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
    expected = torch.sigmoid(Encoder.forward(model.encoder, images) + expected)
    torch.testing.assert_close(codes_of(model, images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_kl_it_is_added_to_the_means_alone(images):
    model = make_model(regularization="kl")
    means, log_variances = model.encoder(images).chunk(2, dim=1)
    plain_means, plain_log_variances = Encoder.forward(model.encoder, images).chunk(2, dim=1)
    shortcut = model.encoder.shortcut(images)
    assert means.shape == log_variances.shape == shortcut.shape == (2, 4, 8, 8)
    assert torch.equal(log_variances, plain_log_variances)
    assert torch.equal(means, plain_means + shortcut) and shortcut.abs().mean() > 0.1


def test_new_models_have_it_and_keep_it(images, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = BricsAutoencoder.from_pretrained(tmp_path).eval()
    assert loaded.config.encoder_shortcut is True
    assert torch.equal(loaded.encoder.shortcut.weight, model.encoder.shortcut.weight)
    assert torch.equal(codes_of(loaded, images), codes_of(model, images))
    nn.init.zeros_(loaded.encoder.shortcut.weight)
    assert not torch.equal(codes_of(loaded, images), codes_of(model, images))


@pytest.mark.parametrize("key_is_there", [True, False])
def test_a_model_without_it_stays_without_it(images, tmp_path, key_is_there):
    model = make_model(encoder_shortcut=False)
    assert type(model.encoder) is Encoder
    model.save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first/config.json").read_text())
    assert config["encoder_shortcut"] is False
    if not key_is_there:
        del config["encoder_shortcut"]
        (tmp_path / "first/config.json").write_text(json.dumps(config))
    loaded = BricsAutoencoder.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = BricsAutoencoder.from_pretrained(tmp_path / "second").eval()
    assert again.config.encoder_shortcut is False and type(again.encoder) is Encoder
    assert torch.equal(codes_of(again, images), codes_of(model, images))
    assert type(BricsAutoencoder.from_config(config).encoder) is Encoder


@torch.no_grad()
def test_the_old_model_reconstructs_as_it_did(disc):
    config = json.loads((OLD_MODEL / "config.json").read_text())
    assert "encoder_shortcut" not in config
    model = BricsAutoencoder.from_pretrained(OLD_MODEL).eval()
    assert model.config.encoder_shortcut is False and type(model.encoder) is Encoder
    output = model(disc)
    for actual, expected in ((output.sample, OLD_SAMPLE), (output.key_codes, OLD_CODES)):
        means = adaptive_avg_pool2d(actual, 2).flatten()
        torch.testing.assert_close(means, torch.tensor(expected), rtol=0, atol=1e-5)
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    twin = BricsAutoencoder(**arguments, encoder_shortcut=False).eval()
    twin.load_state_dict(load_file(OLD_MODEL / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(twin(disc).sample, output.sample)
