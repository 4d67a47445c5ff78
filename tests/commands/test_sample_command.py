"""`brics-diffusers sample`: files and picture, classes, and what it refuses."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.commands import main
from brics_diffusers.pipelines.sampling import load_pipeline, sample_generator, sample_label, sample_path


@pytest.fixture
def flags(saved_pipe, tmp_path):
    words = ["sample", saved_pipe, "--num_samples", 3, "--batch_size", 2, "--num_inference_steps", 2]
    return [*map(str, words), "--output_dir", str(tmp_path / "out")]


def test_files_and_grid(flags, tmp_path, capsys):
    main(flags)
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images in ") and "Sampling" in printed.err and "Denoising" in printed.err
    folder, grid = tmp_path / "out" / "samples", Image.open(tmp_path / "out" / "grid.png")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0000000.png", "0000001.png", "0000002.png", "samples.json"]
    assert grid.size == (3 * 34 + 2, 36)
    for index in range(3):
        x = 2 + 34 * index
        sample = np.array(Image.open(sample_path(folder, index)))
        # Rounded down once more.
        assert np.abs(np.array(grid.crop((x, 2, x + 32, 34))).astype(int) - sample).max() <= 1
    kept = sample_path(folder, 0).stat().st_mtime_ns
    main([*flags, "--num_samples", "4"])  # goes on
    assert sample_path(folder, 3).is_file() and sample_path(folder, 0).stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--scheduler", "EDMEulerScheduler"], "EDMEulerScheduler does not denoise predictions of noise"),
        (["--scheduler", "NoScheduler"], "NoScheduler is no scheduler of diffusers"),
    ],
)
def test_errors(flags, changes, message):
    with pytest.raises(SystemExit, match=f"brics-diffusers sample: {message}"):
        main(flags + changes)


def test_missing_pipeline(tmp_path):
    with pytest.raises(SystemExit, match="brics-diffusers sample: .* holds no model_index.json"):
        main(["sample", str(tmp_path / "missing"), "--output_dir", str(tmp_path)])


class TestClasses:
    @pytest.fixture
    def flags(self, autoencoder, tmp_path):
        torch.manual_seed(1)
        unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=4, **UNET)
        names = {0: "cat", 1: "dog", 2: "bird"}
        BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler(), id2label=names).save_pretrained(
            tmp_path / "p"
        )
        words = ["sample", tmp_path / "p", "--num_samples", 4, "--batch_size", 3, "--num_inference_steps", 2]
        return [*map(str, words), "--output_dir", str(tmp_path / "out")]

    def test_in_turn(self, flags, tmp_path):
        main([*flags, "--class_labels", "all", "--guidance_scale", "2", "--guidance_interval", "0.1", "0.9"])
        settings = json.loads((tmp_path / "out/samples/samples.json").read_text())
        assert settings["class_labels"] == [0, 1, 2]
        assert (settings["guidance_scale"], settings["guidance_interval"]) == (2.0, [0.1, 0.9])
        pipe = load_pipeline(tmp_path / "p")
        for index, name in ((1, "dog"), (3, "cat")):
            options = {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "num_inference_steps": 2}
            image = pipe(1, generator=[sample_generator(0, index)], class_labels=name, **options).images[0]
            found = np.array(Image.open(sample_path(tmp_path / "out/samples", index))).astype(int)
            assert np.abs(found - np.array(image)).max() <= 1
        with pytest.raises(
            SystemExit, match=r"holds samples made otherwise \(different: class_labels, guidance_scale"
        ):
            main([*flags, "--class_labels", "cat"])

    def test_as_in_training(self, flags, tmp_path):
        with pytest.raises(SystemExit, match="has no training_summary.json with class_images; name classes"):
            main([*flags, "--class_labels", "training"])
        weights = {"cat": 1, "dog": 0, "bird": 3}
        (tmp_path / "p/training_summary.json").write_text(json.dumps({"class_images": weights}))
        main([*flags, "--class_labels", "training"])
        assert json.loads((tmp_path / "out/samples/samples.json").read_text())["class_labels"] == weights
        counts = Counter(sample_label(weights, 0, index) for index in range(400))
        assert counts["dog"] == 0 and 250 < counts["bird"] < 350

    def test_faults(self, flags, saved_pipe):
        with pytest.raises(SystemExit, match="'cow' is no class of the model; "):
            main([*flags, "--class_labels", "cow"])
        flags[1] = str(saved_pipe)
        with pytest.raises(SystemExit, match="class_labels are given, but the model was trained without classes"):
            main([*flags, "--class_labels", "cat"])
