"""`brics-diffusers schedules`: its report, with and without pictures of a model."""

import pytest
from PIL import Image

from brics_diffusers.commands import main


def test_without_a_model(run_command):
    result, text, folder = run_command("schedules", "--num_train_timesteps", 100)
    assert set(result["schedules"]) == {"cosine_variant", "cosine", "linear"}
    assert len(result["schedules"]["linear"]["log_snr"]) == 100
    assert "| 0.5 | linear | 0 | 1 |" in text  # half signal, half noise
    assert Image.open(folder / "schedules-log-snr.png").width > 1000
    assert not (folder / "schedules-noised.png").exists() and "Autoencoder" not in text


def test_with_a_model(run_command, model_folder, image_folder):
    flags = [model_folder, "--dataset_name", image_folder, "--dataset_split", "train"]
    result, text, folder = run_command("schedules", *flags, "--batch_size", 1, "--num_images", 3)
    assert (
        "Key codes, scaled by 2, noised and decoded; noise of seed 0. Autoencoder `" in text
        and "3 images of `" in text
        and "--num_images" not in text
    )
    assert result["images"] == 3 and result["times"][0] == 0
    picture = Image.open(folder / "schedules-noised.png")
    assert picture.width > 11 * 34 and picture.height > 9 * 34


def test_fewer_images_than_wanted(run_command, model_folder, image_folder):
    flags = [model_folder, "--dataset_name", image_folder, "--dataset_split", "train", "--seed", 3]
    result, text, _ = run_command("schedules", *flags, "--max_images", 2, "--num_images", 4)
    assert result["images"] == 2
    assert "noise of seed 3. There are only 2 of the 4 images of --num_images. Autoencoder `" in text


@pytest.mark.parametrize("flags", [["--dataset_name", "x"], ["model"]])
def test_half_of_what_pictures_need(flags):
    with pytest.raises(SystemExit, match="pictures need both a model and --dataset_name"):
        main(["schedules", *flags])
