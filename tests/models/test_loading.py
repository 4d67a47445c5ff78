"""What is not loaded as an autoencoder, and what the error says."""

import pytest
from diffusers import VQModel

from brics_diffusers import BricsAutoencoder
from brics_diffusers.models.loading import load_autoencoder


def test_other_models_are_no_autoencoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq")
    (tmp_path / "empty").mkdir()
    assert isinstance(load_autoencoder(str(tmp_path / "pipe")), BricsAutoencoder)
    for name, error, message in (
        ("pipe/unet", ValueError, "unet/config.json is that of a UNet2DModel, but a BricsAutoencoder is needed; name"),
        ("vq", ValueError, "vq/config.json is that of a VQModel, but a BricsAutoencoder is needed; name"),
        ("no/such", FileNotFoundError, "no/such provides no config.json .*; name the folder of a saved"),
        ("empty", FileNotFoundError, "empty provides no config.json .*; name the folder of a saved"),
    ):
        with pytest.raises(error, match=message):
            load_autoencoder(name if name == "no/such" else str(tmp_path / name))
