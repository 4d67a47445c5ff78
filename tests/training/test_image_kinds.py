"""Gray images, images with transparency, and images that are no squares, from the collection to the pipeline."""

import json

import numpy as np
import pytest
import torch
import train_autoencoder
import train_key_codes
from launching import train_here
from PIL import Image, ImageDraw

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline
from brics_diffusers.commands import main
from brics_diffusers.pipelines.image_processor import BricsImageProcessor


class Distance(torch.nn.Module):
    """A perceptual distance that takes what the real ones take."""

    metric_name = "distance"

    def forward(self, sample, target):
        assert sample.shape[1] == target.shape[1] == 3
        return (sample - target).square().mean(dim=(1, 2, 3), keepdim=True)


KINDS = {
    "gray": (["autoencoder.in_channels=1", "autoencoder.out_channels=1"], "L", (32, 32)),
    "rgba": (["autoencoder.in_channels=4", "autoencoder.out_channels=4"], "RGBA", (32, 32)),
    "wide": (["autoencoder.sample_size=[32, 48]", "autoencoder.feature_size=[16, 24]"], "RGB", (48, 32)),
}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """12 discs on a transparent ground, whose hidden colours are noise."""
    folder, random = tmp_path_factory.mktemp("sprites"), np.random.default_rng(0)
    for index in range(12):
        pixels = random.integers(0, 256, (40, 60, 4), dtype=np.uint8)
        pixels[:, :, 3] = 0
        image = Image.fromarray(pixels)
        color = (*random.integers(0, 256, 3).tolist(), 200)
        ImageDraw.Draw(image).ellipse((15, 5, 45, 35), fill=color)
        image.save(folder / f"{index:02d}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_from_collection_to_pipeline(kind, sprites, write_config, tmp_path, monkeypatch):
    changes, mode, (width, height) = KINDS[kind]
    flags = ["--config", write_config(), "--dataset_name", sprites, "--max_train_steps", 2, "--output_dir"]
    monkeypatch.setattr(train_autoencoder, "load_perceptual_network", lambda name: Distance())
    more = ["--perceptual_weight", 1, "--augmentation", "color", "--cache_resized", "--cache_dir", tmp_path / "cache"]
    train_here(
        train_autoencoder.main, *flags, tmp_path / "one", *more, "--num_validation_images", 4, "--set", *changes
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "features"))
    more = ["--autoencoder_name_or_path", tmp_path / "one", "--num_validation_images", 2, "--num_held_out_images", 2]
    more += ["--validation_metrics", "kid", "--feature_extractor", "random-conv", "--num_metric_samples", 4]
    train_here(train_key_codes.main, *flags, tmp_path / "two", *more)
    validation = json.loads((tmp_path / "two/training_summary.json").read_text())["validation"]
    assert {"loss", "kid_random_conv"} <= validation.keys()

    autoencoder = BricsAutoencoder.from_pretrained(tmp_path / "one/autoencoder")
    channels = len(mode)
    assert autoencoder.sample_shape == (channels, height, width)
    pipe = BricsKeyCodePipeline.from_pretrained(tmp_path / "two")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2).images
    square = Image.open(sprites / "00.png").crop((0, 0, width, height))
    images += pipe.reconstruct(square).images + pipe.vary(square, 0.5, 2).images
    mask = Image.new("L", (width, height), 255)
    images += pipe.inpaint([square], mask, num_inference_steps=2).images
    assert {(image.mode, image.size) for image in images} == {(mode, (width, height))}
    arrays = pipe.reconstruct(np.random.rand(2, height, width, channels), output_type="np").images
    assert arrays.shape == (2, height, width, channels)

    collection = ["--dataset_name", str(sprites), "--dataset_split", "train"]
    words = [str(tmp_path / "two"), *collection, "--output_dir"]
    main(["reconstruct", *words, str(tmp_path / "files")])
    written = Image.open(tmp_path / "files/reconstructions/0000003-03.png")
    assert (written.mode, written.size) == (mode, (width, height))
    main(["reconstruct-metrics", *words, str(tmp_path / "metrics"), "--no_perceptual"])
    result = json.loads((tmp_path / "metrics/reconstruct-metrics-standard.json").read_text())
    assert result["images"] == 12 and f"{height} x {width}" in result["preprocessing"]
    samples = ["--dataset_name", str(sprites), "--num_samples", "4", "--num_inference_steps", "2", "--generated"]
    samples += [str(tmp_path / "two"), "--samples_dir", str(tmp_path / "samples"), "--output_dir"]
    metrics = ["--metrics", "fid", "kid", "--feature_extractor", "random-conv", "--kid_extractor", "random-conv"]
    main(["generation-metrics", *samples, str(tmp_path / "generated"), *metrics])
    assert f"| {height} x {width} |" in (tmp_path / "generated/generation-metrics.md").read_text()
    main(["nearest-neighbours", *samples, str(tmp_path / "nearest"), "--distance", "pixels"])
    assert f"to {height} x {width}" in (tmp_path / "nearest/nearest-neighbours.md").read_text()
    for command in ("code-statistics", "grid-usage"):
        main([command, *words, str(tmp_path / command)])
        assert (tmp_path / command / f"{command}.json").is_file()


def test_transparency_survives_reading_and_writing(sprites):
    """What the pipeline gives a model of four channels, and the image that it makes of that."""
    processor = BricsImageProcessor(4, do_resize=False, do_convert_rgb=True)
    image = Image.open(sprites / "00.png")
    sample = processor.preprocess(image)
    back = np.asarray(processor.postprocess(sample, "pil")[0])
    original = np.asarray(image)
    assert np.array_equal(back[:, :, 3], original[:, :, 3])
    seen = original[:, :, 3] > 0
    assert np.array_equal(back[seen], original[seen])
    assert np.all(back[~seen][:, :3] == 255)
