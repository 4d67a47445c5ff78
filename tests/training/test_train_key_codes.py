"""Training of the diffusion model: what is saved, key codes that are kept, several processes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_key_codes
from launching import assert_same_movement, launch, movement, train_here
from PIL import Image
from safetensors.torch import load_file

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data import ImageCollection, load_collection
from brics_diffusers.data.key_codes import KeyCodeDataset
from brics_diffusers.training_utils.curves import read_curves


def test_a_whole_pipeline_is_saved(stage_two):
    output_dir, _ = stage_two
    pipe = BricsKeyCodePipeline.from_pretrained(output_dir)
    images = pipe(2, 3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    assert Image.open(output_dir / "samples.png").width > 32
    assert (output_dir / "checkpoint-4").is_dir()


class TestScalingFactor:
    @pytest.fixture(scope="class")
    def run(self, stage_one, image_folder, write_config, tmp_path_factory):
        """Flags of a run of two steps whose UNet predicts velocities, and its folder when it is done."""
        config = write_config({"scheduler": {"prediction_type": "v_prediction"}})
        flags = ["--config", config, "--dataset_name", image_folder, "--checkpointing_steps", 1]
        flags += ["--num_validation_images", 0, "--lr_scheduler", "constant", "--autoencoder_name_or_path"]
        folder = tmp_path_factory.mktemp("scaled")
        train_here(train_key_codes.main, *flags, stage_one[0], "--max_train_steps", 2, "--output_dir", folder)
        return flags, folder

    def factor(self, folder) -> float:
        pipe = BricsKeyCodePipeline.from_pretrained(folder)
        assert pipe.scheduler.config.clip_sample_range == pipe.autoencoder.scaling_factor / 2
        record = json.loads((folder / "training_config.json").read_text())
        assert record["scaling_factor"] == pipe.autoencoder.config.scaling_factor
        return record["scaling_factor"]

    def test_latents_have_a_deviation_of_one(self, run):
        codes = KeyCodeDataset(run[1] / "key_codes")
        codes = torch.stack([codes[index] for index in range(len(codes))])
        assert (self.factor(run[1]) * codes).std().item() == pytest.approx(1, rel=1e-3)
        assert not BricsKeyCodePipeline.from_pretrained(run[1]).scheduler.config.thresholding

    def test_predictions_of_noise_need_a_clamp(self, stage_two):
        assert self.factor(stage_two[0]) == 2
        assert BricsKeyCodePipeline.from_pretrained(stage_two[0]).scheduler.config.thresholding

    @pytest.mark.parametrize(("whose", "words"), [("/autoencoder", []), ("", []), ("", ["--scaling_factor", 3.5])])
    def test_a_pipelines_autoencoder_keeps_its_own(self, run, tmp_path, whose, words):
        """So that a guide that is trained by itself sees the same latents as the pipeline that it is for."""
        (*flags, name), folder = run
        flags += [name, f"{folder}{whose}", "--output_dir", tmp_path, "--max_train_steps", 1, *words]
        printed = train_here(train_key_codes.main, *flags)
        assert self.factor(tmp_path) == (3.5 if words else self.factor(folder))
        assert "clamps latents" not in printed

    def test_a_run_goes_on_with_what_it_began_with(self, run, stage_one, tmp_path):
        (*flags, name), folder = run
        folder = shutil.copytree(folder, tmp_path / "run")
        flags += [name, stage_one[0], "--output_dir", folder, "--max_train_steps", 3, "--resume_from_checkpoint"]
        factor = self.factor(folder)
        with pytest.raises(ValueError, match=f"--scaling_factor is 2, but the run has begun with {factor}; leave it"):
            train_here(train_key_codes.main, *flags, "checkpoint-2", "--scaling_factor", 2)
        path = folder / "checkpoint-2/custom_checkpoint_2.pkl"
        state = torch.load(path, weights_only=False)
        torch.save(state | {"scaling_factor": 7.0}, path)
        train_here(train_key_codes.main, *flags, "checkpoint-2")
        assert self.factor(folder) == 7
        del state["scaling_factor"]  # as before there was one
        torch.save(state, path)
        train_here(train_key_codes.main, *flags, "checkpoint-2")
        assert self.factor(folder) == 2


def test_half_precision_is_for_what_is_saved(stage_one, stage_two, image_folder, write_config, tmp_path):
    output_dir = shutil.copytree(stage_two[0], tmp_path / "run")
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir, "--random_flip"]
    flags += ["--autoencoder_name_or_path", stage_one[0], "--resume_from_checkpoint", "latest"]
    train_here(train_key_codes.main, *flags, "--save_dtype", "fp16")
    for name in ("autoencoder", "unet"):
        (path,) = (output_dir / name).glob("*.safetensors")
        expected = load_file(stage_two[0] / name / path.name)
        for key, weight in load_file(path).items():
            assert weight.dtype == torch.float16
            torch.testing.assert_close(weight, expected[key].half(), rtol=0, atol=0)


def test_a_run_draws_its_curves(stage_two):
    summary = json.loads((stage_two[0] / "training_summary.json").read_text())
    assert summary["hours"] == round(read_curves(stage_two[0])[1], 2)
    assert read_curves(stage_two[0])[1] > 0
    assert Image.open(stage_two[0] / "curves.png").height == 720  # stage one above stage two
    assert "![Curves of the training](curves.png)" in (stage_two[0] / "README.md").read_text()


def test_key_codes_are_those_of_the_autoencoder(stage_two, image_folder):
    output_dir, printed = stage_two
    autoencoder = BricsKeyCodePipeline.from_pretrained(output_dir).autoencoder.eval()
    stored = KeyCodeDataset(output_dir / "key_codes")
    collection = ImageCollection(load_collection(image_folder), 32, random_flip=True)
    items = [collection[index] for index in range(len(collection))]
    images = torch.stack([item["pixel_values"] for item in items if item["pixel_values"] is not None])
    assert len(stored) == len(images) == 48  # 24 images, their mirror images, and one file that is none, twice
    with torch.no_grad():
        expected = autoencoder.encode(images).key_codes
    codes = torch.stack([stored[index] for index in range(len(stored))])
    # float16 keeps 11 bits: 2**-12 of a value below 1.
    torch.testing.assert_close(codes, expected, rtol=0, atol=2**-11)
    assert len(list((output_dir / "key_codes").glob("codes-*.npy"))) == 10  # 50 rows in shards of 5
    assert "skipped 1 unreadable file" in printed


def test_same_key_codes_are_not_made_again(stage_one, stage_two, image_folder, write_config, tmp_path):
    folder = stage_two[0] / "key_codes"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--autoencoder_name_or_path", stage_one[0]]
    flags += ["--key_codes_dir", folder, "--max_train_steps", 1, "--num_validation_images", 0]
    train_here(train_key_codes.main, *flags, "--random_flip", "--output_dir", tmp_path / "same")
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    # Without mirror images these would be other codes.
    with pytest.raises(ValueError, match="holds key codes of another autoencoder, collection, resolution"):
        train_here(train_key_codes.main, *flags, "--output_dir", tmp_path / "other")


def test_processes_draw_what_one_draws():
    def draw(batch, seed, count, index, processes):
        accelerator = SimpleNamespace(device="cpu", process_index=index, num_processes=processes)
        return train_key_codes.draw_noise((count, 4, 8, 8), seed, batch, accelerator, 1000)

    whole = draw(3, 0, 4, 0, 1)
    for parts, expected in zip(zip(*(draw(3, 0, 2, index, 2) for index in (0, 1)), strict=True), whole, strict=True):
        assert torch.equal(torch.cat(parts), expected)
    assert not any(torch.equal(whole[0], draw(*other, 4, 0, 1)[0]) for other in ((4, 0), (3, 1)))


@pytest.mark.slow
def test_two_processes_equal_one_with_doubled_batch(tmp_path, image_folder, write_config, stage_one):
    moves = []
    for processes in (1, 2):
        output_dir = tmp_path / str(processes)
        flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
        # A large epsilon makes Adam's first step proportional to the gradient, see test_train_autoencoder.py.
        flags += ["--adam_epsilon", 1.0, "--learning_rate", 1.0, "--train_batch_size", 4 // processes]
        flags += ["--max_train_steps", 2, "--checkpointing_steps", 1, "--num_validation_images", 3]
        flags += ["--autoencoder_name_or_path", stage_one[0]]
        if processes == 1:
            train_here(train_key_codes.main, *flags)
        else:
            launch("train_key_codes.py", *flags, processes=processes)
        moves.append(movement(output_dir, 1, 2))
        assert json.loads((output_dir / "key_codes/manifest.json").read_text())["counts"] == [5, 5, 5, 5, 4]
    assert_same_movement(*moves)
    grids = [np.array(Image.open(tmp_path / str(processes) / "samples.png")).astype(int) for processes in (1, 2)]
    assert np.abs(grids[0] - grids[1]).max() <= 2  # the same samples, to rounding


def test_an_autoencoder_is_needed(capsys):
    with pytest.raises(SystemExit):
        train_key_codes.parse_args(["--dataset_name", "x"])
    assert "no autoencoder: give --autoencoder_name_or_path" in capsys.readouterr().err
