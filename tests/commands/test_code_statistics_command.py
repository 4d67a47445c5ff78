"""`brics-diffusers code-statistics`: its report and pictures."""

import pytest
from PIL import Image
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder


@pytest.mark.parametrize("regularization", ["noise", "kl"])
def test_report(run_command, image_folder, tmp_path, regularization):
    BricsAutoencoder(**AUTOENCODER, regularization=regularization).save_pretrained(tmp_path / "model")
    result, text, folder = run_command("code-statistics", tmp_path / "model", "--dataset_name", image_folder)
    assert sum(result["histogram"][0]) == 24 * 8 * 8 and len(result["channels"]) == 4
    assert (
        f"Autoencoder `{tmp_path / 'model'}`. 24 images of `{image_folder}` (train): central square, Lanczos" in text
    )
    assert result["relaxed_precision"] == 1 / 64 and "1 / (4 * 16) is 0.01562" in text
    assert ("precision" in result) == (regularization == "kl") == ("less exact than the relaxed" in text)
    assert Image.open(folder / "code-statistics-plot.png").width > (500 if regularization == "noise" else 1000)
