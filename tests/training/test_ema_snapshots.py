"""Stage two with averages whose length is chosen afterwards."""

import shutil

import pytest
import torch
import train_key_codes
from launching import launch, train_here
from safetensors.torch import load_file

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.training_utils.post_hoc_ema import SNAPSHOTS, load_average, snapshot_files


@pytest.fixture
def flags(image_folder, write_config, stage_one):
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--autoencoder_name_or_path", stage_one[0]]
    return [*flags, "--num_validation_images", 0, "--checkpointing_steps", 1, "--random_flip"]


def test_snapshots_change_nothing_else_and_a_resumed_run_has_the_same(stage_two, flags, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*flags, "--key_codes_dir", stage_two[0] / "key_codes"]
    train_here(train_key_codes.main, *flags, "--output_dir", whole, "--ema_snapshot_steps", 3)
    assert [path.name for path in snapshot_files(whole / SNAPSHOTS)] == [
        "00000003.safetensors",
        "00000004.safetensors",
    ]
    (weights,), (expected,) = ((folder / "unet").glob("*.safetensors") for folder in (whole, stage_two[0]))
    assert weights.read_bytes() == expected.read_bytes()

    shutil.copytree(whole, resumed)
    for step in (3, 4):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    train_here(
        train_key_codes.main,
        *[*flags, "--output_dir", resumed, "--ema_snapshot_steps", 3, "--resume_from_checkpoint", "latest"],
    )
    for path, other in zip(snapshot_files(whole / SNAPSHOTS), snapshot_files(resumed / SNAPSHOTS), strict=True):
        assert path.read_bytes() == other.read_bytes()
    assert len(list((resumed / SNAPSHOTS).glob("superseded-*"))) == 2

    assert_by_definition(whole, 4)


def assert_by_definition(folder, steps: int) -> None:
    """Snapshots are averages of the weights of all steps, which checkpoints have."""
    pipe = BricsKeyCodePipeline.from_pretrained(folder)
    for length, power in ((0.05, 17.9722), (0.1, 7.9372)):  # of a step's share of those until it, exponent + 1
        assert load_average(pipe.unet, folder / SNAPSHOTS, length) < 1e-6
        for name, weight in pipe.unet.named_parameters():
            weights = [
                load_file(folder / f"checkpoint-{step}/model.safetensors")[name] for step in range(1, steps + 1)
            ]
            shares = [(step / steps) ** power - ((step - 1) / steps) ** power for step in range(1, steps + 1)]
            average = sum(share * value for share, value in zip(shares, weights, strict=True))
            torch.testing.assert_close(weight.data, average, rtol=0, atol=5e-7)  # steps are of up to 8e-5


@pytest.mark.slow
def test_two_processes(flags, tmp_path):
    launch("train_key_codes.py", *flags, "--output_dir", tmp_path, "--ema_snapshot_steps", 2, processes=2)
    assert [int(path.stem) for path in snapshot_files(tmp_path / SNAPSHOTS)] == [2, 4]
    assert list((tmp_path / SNAPSHOTS).glob(".*")) == []
    assert_by_definition(tmp_path, 4)


def test_averages_begin_with_the_first_step(stage_one, stage_two, flags, tmp_path):
    folder = shutil.copytree(stage_two[0], tmp_path / "run")
    with pytest.raises(ValueError, match="--ema_snapshot_steps averages from the first step on, but the checkpoint"):
        train_here(
            train_key_codes.main,
            *[*flags, "--output_dir", folder, "--ema_snapshot_steps", 3, "--resume_from_checkpoint", "latest"],
        )
