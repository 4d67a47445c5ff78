"""Runs of both stages on a stream of webdataset's tars."""

import io
import json
import tarfile

import pytest
import train_autoencoder
import train_key_codes
from launching import launch, train_here

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data.key_codes import KeyCodeDataset
from brics_diffusers.training_utils.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def tars(image_folder, tmp_path_factory):
    """The collection in three tars, the last of which has a file that is no image, and a validation split of one."""
    folder, names = tmp_path_factory.mktemp("tars"), sorted(image_folder.glob("[0-9]*.png"))
    for split, shard, images in (*(("train", i, names[i:20:3]) for i in range(3)), ("validation", 0, names[20:])):
        with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w") as tar:
            for path in images:
                tar.add(path, path.name)
            if shard == 2:
                tar.addfile(tarfile.TarInfo("99.png"), io.BytesIO())
    return folder


@pytest.fixture
def flags(tars, write_config):
    return ["--config", write_config(), "--dataset_name", tars, "--streaming", "--random_flip"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_equals_an_uninterrupted_one(flags, processes, tmp_path):
    flags += ["--adversarial_weight", 0, "--checkpointing_steps", 3, "--num_validation_images", 3]
    flags += ["--dataloader_num_workers", processes - 1 and 2]
    for name, steps in (("whole", [9]), ("broken", [3, 6, 9])):  # 9 steps are nearly two epochs of one process
        for last in steps:
            more = ["--output_dir", tmp_path / name, "--max_train_steps", last, "--resume_from_checkpoint", "latest"]
            if processes == 1:
                printed = train_here(train_autoencoder.main, *flags, *more)
            else:
                printed = launch("train_autoencoder.py", *flags, *more, processes=processes).stderr
    assert "Resumed from" in printed and "The run can't end" not in printed and "goes on with epoch" not in printed
    assert "99.png (shard 2)" in printed
    weights = [(tmp_path / name / "checkpoint-9/model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    summary = json.loads((tmp_path / "whole/training_summary.json").read_text())
    assert summary["training_images"] is None and "psnr" in summary["validation"]
    assert [path.name for path in list_checkpoints(tmp_path / "broken")] == [f"checkpoint-{n}" for n in (3, 6, 9)]


@pytest.mark.slow
def test_stage_two(flags, stage_one, tmp_path):
    flags += ["--autoencoder_name_or_path", stage_one[0], "--output_dir", tmp_path, "--num_validation_images", 0]
    train_here(train_key_codes.main, *flags, "--max_train_steps", 1)
    assert len(KeyCodeDataset(tmp_path / "key_codes")) == 40  # 20 images and their mirror images
    assert len(list((tmp_path / "key_codes").glob("*.npy"))) == 3
    BricsKeyCodePipeline.from_pretrained(tmp_path)
    train_here(train_key_codes.main, *flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("flag", [["--max_train_samples", "5"], ["--cache_resized"], ["--num_train_epochs", "2"]])
def test_what_a_stream_can_not_have(flags, flag, capsys):
    with pytest.raises(SystemExit):
        train_autoencoder.parse_args([*map(str, flags), *flag])
    assert f"{flag[0]} is not for --streaming" in capsys.readouterr().err
