"""What stage two measures as it trains, and that it trains as without."""

import json
import shutil

import pytest
import torch
import train_key_codes
from launching import launch, train_here
from PIL import Image
from safetensors.torch import load_file
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline
from brics_diffusers.training_utils.checkpoints import list_checkpoints
from brics_diffusers.training_utils.curves import read_curves


METRICS = ["--validation_metrics", "kid", "--feature_extractor", "random-conv", "--num_metric_samples", 4]
LOSSES = ["loss", "loss_t_0.00_0.25", "loss_t_0.25_0.50", "loss_t_0.50_0.75", "loss_t_0.75_1.00"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of an autoencoder."""
    folder = tmp_path_factory.mktemp("model")
    BricsAutoencoder(**AUTOENCODER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory, image_folder):
    """16 training images and a validation split of 4."""
    folder = tmp_path_factory.mktemp("collection")
    for index, path in enumerate(sorted(image_folder.glob("[0-9]*.png"))[:20]):
        target = folder / ("validation" if index % 5 == 0 else "train") / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


@pytest.fixture
def flags(saved, collection, write_config, tmp_path, monkeypatch):
    """The flags of a short run; features are kept in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unet = {"dropout": 0.3}  # draws from the random state that validations must leave alone
    config = write_config({"unet": unet, "train_key_codes": {"learning_rate": 1e-3}})
    flags = ["--config", config, "--autoencoder_name_or_path", saved, "--dataset_name", collection]
    return [*flags, "--validation_steps", 1, "--checkpointing_steps", 2, "--num_validation_images", 2]


def unet_of(path):
    return load_file(path / "unet/diffusion_pytorch_model.safetensors")


def content(checkpoint):
    return [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl"))]


def test_training_is_the_same_with_and_without(flags, tmp_path):
    none = ["--num_validation_images", 0, "--num_held_out_images", 0]
    for name, more in (("none", none), ("all", METRICS), ("samples", ["--num_held_out_images", 0])):
        train_here(train_key_codes.main, *flags, *more, "--output_dir", tmp_path / name)
    curves = {name: read_curves(tmp_path / name)[0] for name in ("none", "all", "samples")}
    for name in ("all", "samples"):
        assert curves[name]["train/loss"] == curves["none"]["train/loss"] and len(curves[name]["train/loss"]) == 4
        before, after = unet_of(tmp_path / "none"), unet_of(tmp_path / name)
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(name.startswith("validation") for run in ("none", "samples") for name in curves[run])
    assert not list((tmp_path / "samples").glob("*best*"))
    pictures = [Image.open(tmp_path / name / "samples.png").tobytes() for name in ("all", "samples")]
    assert pictures[0] == pictures[1]

    output_dir, measured = tmp_path / "all", curves["all"]
    for name in (*LOSSES, "kid_random_conv"):
        assert [step for step, _ in measured[f"validation/{name}"]] == [1, 2, 3, 4]
    summary = json.loads((output_dir / "training_summary.json").read_text())["validation"]
    assert list(summary) == ["step", *LOSSES, "kid_random_conv"] and summary["step"] == 4
    assert summary["loss"] == pytest.approx(measured["validation/loss"][-1][1])
    distances = [value for _, value in measured["validation/kid_random_conv"]]
    assert len(set(distances)) == 4
    best = BricsKeyCodePipeline.from_pretrained(output_dir / "pipeline-best")
    assert type(best.scheduler).__name__ == "CosineVariantScheduler"
    is_last = all(torch.equal(value, unet_of(output_dir)[key]) for key, value in best.unet.state_dict().items())
    assert is_last == (distances.index(min(distances)) == 3)
    assert (output_dir / "curves.png").is_file()


def test_resumed_runs_know_what_was_best(flags, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(train_key_codes.main, *flags, *METRICS, "--output_dir", whole)
    broken.mkdir()
    for name in ("checkpoint-2", "key_codes", "pipeline-best"):
        shutil.copytree(whole / name, broken / name)
    more = "--output_dir", broken, "--resume_from_checkpoint", "latest"
    assert "The run can't end" not in train_here(train_key_codes.main, *flags, *METRICS, *more)
    (state,) = [part for part in content(whole / "checkpoint-4") if "best_perceptual" in part]
    assert state in content(broken / "checkpoint-4")
    assert state["best_perceptual"][0] == "kid_random_conv" and state["validation"]["step"] == 4
    before, after = unet_of(whole / "pipeline-best"), unet_of(broken / "pipeline-best")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [path.name for path in list_checkpoints(broken)] == ["checkpoint-2", "checkpoint-4"]


def test_training_images_are_held_out_on_demand(flags, image_folder, tmp_path):
    flags += ["--dataset_name", image_folder, "--max_train_steps", 1]
    train_here(train_key_codes.main, *flags, "--output_dir", tmp_path / "none")
    printed = train_here(train_key_codes.main, *flags, "--num_held_out_images", 9, "--output_dir", tmp_path / "some")
    assert "No validation split: 2 of 25 images are held out." in printed
    counts = [
        json.loads((tmp_path / name / "training_summary.json").read_text())["training_images"]
        for name in ("none", "some")
    ]
    assert counts == [25, 23]
    assert "validation/loss" in read_curves(tmp_path / "some")[0]
    assert "validation/loss" not in read_curves(tmp_path / "none")[0]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(flags, tmp_path):
    metrics = []
    for processes in (1, 2):
        output_dir = tmp_path / str(processes)
        # So few samples that one process has none of those that are shown; the weights stay, since dropout differs.
        more = [*METRICS, "--max_train_steps", 1, "--learning_rate", 1e-9, "--num_validation_images", 1]
        more += ["--train_batch_size", 4 // processes]
        launch("train_key_codes.py", *flags, *more, "--output_dir", output_dir, processes=processes)
        metrics.append(json.loads((output_dir / "training_summary.json").read_text())["validation"])
        assert (output_dir / "pipeline-best").is_dir()
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-2)
