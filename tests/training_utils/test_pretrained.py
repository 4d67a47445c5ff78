"""Pretrained autoencoders whose training goes on with other noise on key codes."""

import pytest
import train_autoencoder
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder
from brics_diffusers.training_utils.pretrained import build_autoencoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of autoencoders by their regularisation."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("noise", "kl", "interpolate"):
        BricsAutoencoder(**AUTOENCODER, regularization=name).save_pretrained(folder / name)
    return folder


def build(path, *words):
    flags = ["--dataset_name", "x", "--pretrained_autoencoder_name_or_path", path, *words]
    autoencoder = build_autoencoder(train_autoencoder.parse_args(list(map(str, flags))))
    config = autoencoder.config
    return autoencoder, (config.regularization, config.key_noise_scale, config.interpolation_gamma)


@pytest.mark.parametrize("decoder_only", [False, True])
@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("noise", ["--key_noise_scale", 0.1], ("noise", 0.1, 1.0)),
        ("noise", ["--set", "autoencoder.key_noise_scale=0.1"], ("noise", 0.1, 1.0)),
        ("noise", ["--key_noise_scale", 0.2, "--set", "autoencoder.key_noise_scale=0.1"], ("noise", 0.2, 1.0)),
        ("noise", ["--set", "autoencoder.regularization=interpolate"], ("interpolate", None, 1.0)),
        (
            "noise",
            ["--set", "autoencoder.regularization=interpolate", "autoencoder.interpolation_gamma=0.5"],
            ("interpolate", None, 0.5),
        ),
        ("interpolate", ["--set", "autoencoder.interpolation_gamma=3"], ("interpolate", None, 3)),
        (
            "interpolate",
            ["--set", "autoencoder.regularization=noise", "autoencoder.key_noise_scale=0.3"],
            ("noise", 0.3, 1.0),
        ),
    ],
)
def test_noise_may_be_another(saved, name, words, expected, decoder_only):
    autoencoder, noise = build(saved / name, *words, *["--train_decoder_only"] * decoder_only)
    assert noise == expected
    assert all(parameter.requires_grad != decoder_only for parameter in autoencoder.encoder.parameters())
    assert all(parameter.requires_grad for parameter in autoencoder.grids.parameters())
    before = BricsAutoencoder.from_pretrained(saved / name).state_dict()
    assert all(value.equal(before[key]) for key, value in autoencoder.state_dict().items())


def test_the_decoder_gets_the_noise_that_is_named(saved):
    """Without its regularisation, a scale would have no effect."""
    flags = "--train_decoder_only", "--key_noise_scale", 0.1
    assert build(saved / "interpolate", *flags)[1][:2] == ("noise", 0.1)
    flags = "--train_decoder_only", "--set", "autoencoder.interpolation_gamma=2"
    assert build(saved / "noise", *flags)[1] == ("interpolate", None, 2)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("noise", ["--set", "autoencoder.key_length=2"], "--set autoencoder.key_length is for new models; of a pretr"),
        ("noise", ["--set", "autoencoder.regularization=kl"], "has regularization 'noise', and encoders with and wit"),
        (
            "kl",
            ["--set", "autoencoder.regularization=noise"],
            "has regularization 'kl', and encoders with and without",
        ),
        ("noise", ["--set", "autoencoder.regularization=vq"], "regularization is 'vq'; it must be one of"),
        ("noise", ["--set", "autoencoder.interpolation_gamma=-1"], "interpolation_gamma is -1; it must be above 0"),
        ("noise", ["--train_decoder_only"], "give --key_noise_scale, above 0.01562, or --set autoencoder.regularizat"),
        ("kl", ["--train_decoder_only", "--key_noise_scale", 1], "it can't with regularization 'kl'"),
    ],
)
def test_what_can_not_change(saved, name, words, message):
    with pytest.raises(ValueError, match=message):
        build(saved / name, *words)


def test_new_models_by_set():
    flags = ["--dataset_name", "x", "--set", "autoencoder.regularization=interpolate"]
    flags += ["autoencoder.interpolation_gamma=0.5", "autoencoder.sample_size=64", "autoencoder.feature_size=16"]
    config = build_autoencoder(train_autoencoder.parse_args(flags)).config
    assert (config.regularization, config.interpolation_gamma, config.sample_size) == ("interpolate", 0.5, 64)
