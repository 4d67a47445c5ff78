"""`brics-diffusers class-accuracy`: its report, and what it refuses."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.commands import main


COLOURS = {"cat": (220, 40, 40), "dog": (40, 40, 220), "rare": (40, 220, 40)}


@pytest.fixture
def collection(tmp_path):
    """Noisy images of one colour a class, the last of which the model does not know; held out, one dog is red."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                odd = split == "validation" and name == "dog" and index == 0
                pixels = np.array(COLOURS["cat"] if odd else colour) + random.integers(-30, 30, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def class_pipe_folder(autoencoder, tmp_path):
    torch.manual_seed(1)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3, **UNET)
    pipe = BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler(), id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained(tmp_path / "by-class")
    return tmp_path / "by-class"


def test_samples_beside_held_out_images(class_pipe_folder, collection, run_command):
    words = [class_pipe_folder, "--dataset_name", collection, "--num_samples", 5, "--num_inference_steps", 2]
    result, text, folder = run_command("class-accuracy", *words, "--feature_extractor", "random-conv")
    assert result["classes"]["validation"] == {"cat": 1, "dog": 0.75, "balanced accuracy": 0.875}
    samples = result["classes"]["samples"]
    assert samples["cat"] * 3 in (0, 1, 2, 3) and samples["dog"] * 2 in (0, 1, 2)  # of three and of two
    assert samples["balanced accuracy"] == (samples["cat"] + samples["dog"]) / 2
    assert "| dog | " in text and "75.0%" in text and (folder / "samples/0000004.png").is_file()


def test_faults(saved_pipe, class_pipe_folder, collection, tmp_path):
    common = ["--dataset_name", str(collection), "--output_dir", str(tmp_path / "out")]
    for words, message in (
        ([str(saved_pipe)], "has no classes with names"),
        ([str(class_pipe_folder), "--class_labels", "cat"], "--class_labels are all classes in turn here"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["class-accuracy", *words, *common])
