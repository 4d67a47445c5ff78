"""Runs of both stages on a stream of webdataset's tars."""

import io
import json
import signal
import subprocess
import tarfile
import time

import psutil
import pyarrow.parquet as pq
import pytest
import train_autoencoder
import train_key_codes
from launching import command, environment, launch, train_here
from small_models import ROOT

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data.key_codes import KeyCodeDataset
from brics_diffusers.training_utils.checkpoints import list_checkpoints


EMOJI = ROOT.parent / "shared/data/noto-emoji-64"


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


@pytest.fixture(scope="module")
def emoji_tars(tmp_path_factory):
    """The training images of noto-emoji-64 in seven tars, in which each has its name in a JSON file beside it."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = pq.read_table(EMOJI / "train-00000-of-00001.parquet").to_pylist()
    for shard in range(7):
        with tarfile.open(folder / f"emoji-{shard:05d}.tar", "w") as tar:
            for row in rows[shard::7]:
                for extension, data in (("png", row["image"]["bytes"]), ("json", json.dumps(row["name"]).encode())):
                    info = tarfile.TarInfo(f"{row['code']}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def launch_and_kill(script, *flags, at):
    """A run of two processes, all of which are killed when a file or folder is there."""
    words = command(script, *flags, processes=2)
    run = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not at.exists():
        assert run.poll() is None, run.stderr.read()[-4000:]
        time.sleep(0.001)
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    run.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not EMOJI.is_dir(), reason="the noto-emoji-64 collection is not beside this checkout")
def test_emoji_in_two_processes_that_are_killed(emoji_tars, write_config, tmp_path):
    """Both stages; the first for more than an epoch, the second killed once while it encodes and once in training."""
    flags = ["--config", write_config(), "--dataset_name", emoji_tars, "--streaming", "--random_flip"]
    flags += ["--max_train_steps", 18, "--checkpointing_steps", 6, "--dataloader_num_workers", 1]
    flags += ["--resume_from_checkpoint", "latest"]
    one = ["--adversarial_weight", 0, "--train_batch_size", 128, "--num_validation_images", 70]
    two = ["--autoencoder_name_or_path", tmp_path / "one-whole", "--num_validation_images", 0]
    two += ["--num_held_out_images", 70, "--encode_batch_size", 128]
    stages = {"one": ["train_autoencoder.py", *one], "two": ["train_key_codes.py", *two]}
    for stage, (script, *own) in stages.items():
        whole, broken = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-broken"
        launch(script, *flags, *own, "--output_dir", whole, processes=2)
        own += ["--output_dir", broken]
        if stage == "two":
            launch_and_kill(script, *flags, *own, at=broken / "key_codes/codes-00003.npy")
        launch_and_kill(script, *flags, *own, at=broken / "checkpoint-6")
        done = launch(script, *flags, *own, processes=2)
        assert "Resumed from" in done.stderr and "goes on with epoch" not in done.stderr
        weights = [(path / "checkpoint-18/model.safetensors").read_bytes() for path in (whole, broken)]
        assert weights[0] == weights[1]
        assert json.loads((broken / "training_summary.json").read_text())["validation"]
    assert len(KeyCodeDataset(broken / "key_codes")) == 2 * (3281 - 70)
