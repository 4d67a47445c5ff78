"""The comparison of classes and guidance with tiny models: what is trained and tried, its report, and going on."""

import json
import shutil

import compare_guidance
import pytest
import torch
import train_key_codes
import yaml
from launching import CONFIG, train_here
from PIL import Image
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline, commands


KID = "KID (random-conv)"


@pytest.fixture(scope="module")
def flags(tmp_path_factory, image_folder):
    """Command line for two seeds of models of milliseconds, and images in folders of two classes."""
    root = tmp_path_factory.mktemp("guidance")
    for index in range(24):
        folder = root / "images" / ("odd" if index % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"{index:02d}.png", folder)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = BricsAutoencoder(**AUTOENCODER)
        torch.nn.init.normal_(model.grids.entries)  # as large as after training, so that codes matter
        model.save_pretrained(root / f"models/BRICS-{seed}")
    config = {"unet": CONFIG["unet"], "train_key_codes": CONFIG["train_key_codes"]}
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = ["--autoencoders", root / "models", "--config", root / "tiny.yaml", "--dataset_name", root / "images"]
    words += ["--seeds", 0, 1, "--max_train_steps", 4, "--guide_step", 2, "--num_samples", 12]
    words += ["--num_inference_steps", 3, "--extractor", "random-conv", "--guidance_scales", 2]
    return [*map(str, words)]


@pytest.fixture
def started(monkeypatch):
    """Runs scripts in this process; a list of which were."""
    names = []

    def run(script, words, log):
        names.append(getattr(script, "name", words[0]))
        if script == "brics_diffusers.commands":
            commands.main(words)
        else:
            train_here(train_key_codes.main, *words)

    monkeypatch.setattr(compare_guidance, "run_script", run)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return names


def test_each_is_trained_and_tried_once(flags, started, tmp_path):
    compare_guidance.main([*flags, "--seeds", "1", "--no-report", "--output_dir", str(tmp_path)])
    assert started == ["train_key_codes.py", "guidance-search"] * 2 + ["guidance-search"]
    assert not (tmp_path / "guidance.json").exists()
    compare_guidance.main([*flags, "--output_dir", str(tmp_path)])
    assert len(started) == 10  # those of seed 1 are not run again
    result = json.loads((tmp_path / "guidance.json").read_text())
    found = {(row["variant"], row["seed"]): row["kid"] for row in result["values"]}
    assert {(name, seed): list(kid) for (name, seed), kid in found.items()} == {
        (name, seed): ["2.0"] if name == "classes-unguided" else ["1.0", "2.0"]
        for name in ("none", "classes", "classes-unguided")
        for seed in (0, 1)
    }
    assert [row["guidance scale"] for row in result["rows"]] == [1, 2, 1, 2, 2]
    first, second, *_, last = result["rows"]
    assert first["of that without classes and guidance"] == "1.00 ± 0.00"
    shares = [found["none", seed]["2.0"] / found["none", seed]["1.0"] for seed in (0, 1)]
    assert second["of that without classes and guidance"].startswith(f"{sum(shares) / 2:.2f} ±")
    assert last["by seed"] == ", ".join(f"{found['classes-unguided', seed]['2.0']:.0f}" for seed in (0, 1))
    with Image.open(tmp_path / "guidance-samples.png") as picture:
        assert picture.size == (12 * (AUTOENCODER["sample_size"] + 2) + 2, 5 * (AUTOENCODER["sample_size"] + 2) + 2)


def test_what_guides(flags, started, tmp_path):
    compare_guidance.main([*flags, "--seeds", "0", "--no-report", "--output_dir", str(tmp_path)])
    guided, unguided = (
        BricsKeyCodePipeline.from_pretrained(tmp_path / name) for name in ("classes-0", "classes-unguided-0")
    )
    assert guided.guide is not None and unguided.guide is None and unguided.class_names == ["even", "odd"]
    pairs = zip(guided.unet.state_dict().values(), unguided.unet.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    none = BricsKeyCodePipeline.from_pretrained(tmp_path / "none-0")
    assert none.guide is not None and none.class_names is None


def test_other_settings_are_refused(flags, started, tmp_path):
    (tmp_path / "settings.json").write_text('{"config": "other.yaml"}')
    with pytest.raises(ValueError, match="was trained with config other.yaml, not .*tiny.yaml; give the same flags"):
        compare_guidance.main([*flags, "--output_dir", str(tmp_path)])
    assert not started


def test_few_samples_and_no_scale(flags, started, tmp_path):
    words = ["--seeds", "0", "--guidance_scales", "1", "--num_samples", "4", "--output_dir", str(tmp_path)]
    compare_guidance.main([*flags, *words])
    result = json.loads((tmp_path / "guidance.json").read_text())
    assert [row["guidance scale"] for row in result["rows"]] == [1, 1]
    with Image.open(tmp_path / "guidance-samples.png") as picture:
        assert picture.size == (4 * (AUTOENCODER["sample_size"] + 2) + 2, 2 * (AUTOENCODER["sample_size"] + 2) + 2)
