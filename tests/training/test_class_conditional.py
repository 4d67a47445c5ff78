"""Class-conditional training of stage two."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
import train_key_codes
from launching import assert_same_movement, launch, movement, train_here
from PIL import Image
from safetensors.torch import load_file

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data.key_codes import KeyCodeDataset
from brics_diffusers.training_utils.classes import drop_labels, frequent_labels, known_classes, spread_labels


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory, image_folder):
    """The images of `image_folder` in folders of three classes, of which one has 2."""
    root = tmp_path_factory.mktemp("classes")
    for index in range(24):
        folder = root / ("rare" if index < 2 else "odd" if index % 2 else "even")
        folder.mkdir(exist_ok=True)
        shutil.copy(image_folder / f"{index:02d}.png", folder)
    return root


@pytest.fixture
def flags(class_folder, write_config, stage_one):
    flags = ["--config", write_config(), "--dataset_name", class_folder, "--autoencoder_name_or_path", stage_one[0]]
    return [*flags, "--class_conditional", "--min_class_images", 3]


def weights(folder, name: str = "unet") -> dict:
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, class_folder, write_config, stage_one):
    """A finished run, and what it printed."""
    output_dir = tmp_path_factory.mktemp("class-conditional")
    flags = ["--config", write_config(), "--dataset_name", class_folder, "--autoencoder_name_or_path", stage_one[0]]
    flags += ["--class_conditional", "--min_class_images", 3, "--random_flip", "--checkpointing_steps", 2]
    flags += ["--num_validation_images", 4, "--output_dir", output_dir]
    return output_dir, train_here(train_key_codes.main, *flags)


class TestRun:
    def test_the_pipeline_knows_its_classes(self, trained):
        output_dir, printed = trained
        assert "with less than 3 image(s) are left out: rare (2)" in printed
        pipe = BricsKeyCodePipeline.from_pretrained(output_dir)
        assert pipe.class_names == ["even", "odd"] and pipe.unet.config.num_class_embeds == 3
        summary = json.loads((output_dir / "training_summary.json").read_text())
        assert summary["class_images"] == {"even": 11, "odd": 11}
        card = (output_dir / "README.md").read_text()
        assert "Classes: even, odd." in card and 'pipe(class_labels=["even", "odd"])' in card
        images = pipe(2, 2, class_labels="odd", guidance_scale=2.0, output_type="pt").images
        assert images.isfinite().all()
        assert Image.open(output_dir / "samples.png").width > 32

    def test_labels_are_those_of_the_images(self, trained):
        stored = KeyCodeDataset(trained[0] / "key_codes", with_labels=True)
        assert stored.labels.tolist() == ([0] * 11 + [1] * 11) * 2  # files are sorted by folder; mirror images follow
        code, label = stored[12]
        assert code.shape == (4, 8, 8) and label == 1
        assert torch.equal(KeyCodeDataset(trained[0] / "key_codes")[12], code)

    def test_resuming_is_exact(self, trained, flags, tmp_path):
        folder = shutil.copytree(trained[0], tmp_path / "run")
        shutil.rmtree(folder / "checkpoint-4")
        flags = [*flags, "--random_flip", "--checkpointing_steps", 2, "--num_validation_images", 4, "--guide_step", 3]
        with pytest.raises(ValueError, match="--guide_step is 1, but the run is at step 2 and .* has no guide; give"):
            resumed = ["--output_dir", folder, "--resume_from_checkpoint", "latest", "--guide_step", 1]
            train_here(train_key_codes.main, *flags, *resumed)
        train_here(train_key_codes.main, *flags, "--output_dir", folder, "--resume_from_checkpoint", "latest")
        expected = weights(trained[0])
        assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
        guide = weights(folder, "guide")  # the averaged weights of a step before
        assert guide.keys() == expected.keys() and not all(torch.equal(guide[name], expected[name]) for name in guide)
        pipe = BricsKeyCodePipeline.from_pretrained(folder)
        assert pipe(1, 2, class_labels=1, guidance_scale=2.0, output_type="pt").images.isfinite().all()

    def test_a_trained_pipeline_goes_on(self, trained, class_folder, write_config, tmp_path, image_folder):
        flags = ["--config", write_config(), "--pretrained_model_name_or_path", trained[0], "--max_train_steps", 1]
        flags += ["--num_validation_images", 0, "--output_dir", tmp_path / "run", "--learning_rate", 0]
        with pytest.raises(ValueError, match="is class-conditional; add --class_conditional"):
            train_here(train_key_codes.main, *flags, "--dataset_name", image_folder)
        flags += ["--class_conditional", "--dataset_name"]
        with pytest.raises(ValueError, match=r"has classes that the model does not know \(rare\); it knows even, odd"):
            train_here(train_key_codes.main, *flags, class_folder)
        only_odd = tmp_path / "collection"
        shutil.copytree(class_folder / "odd", only_odd / "odd")
        train_here(train_key_codes.main, *flags, only_odd)
        assert KeyCodeDataset(tmp_path / "run/key_codes", with_labels=True).labels.tolist() == [1] * 11
        pipe = BricsKeyCodePipeline.from_pretrained(tmp_path / "run")
        assert pipe.class_names == ["even", "odd"]
        expected = weights(trained[0])
        assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items())

    @pytest.mark.slow
    def test_two_processes_equal_one_with_doubled_batch(self, flags, tmp_path):
        moves = []
        for processes in (1, 2):
            # A large epsilon makes Adam's first step proportional to the gradient, see test_train_autoencoder.py.
            more = ["--adam_epsilon", 1.0, "--learning_rate", 1.0, "--train_batch_size", 4 // processes]
            more += ["--max_train_steps", 2, "--checkpointing_steps", 1, "--num_validation_images", 3]
            more += ["--balance_classes", "--class_dropout_prob", 0.5, "--output_dir", tmp_path / str(processes)]
            launch("train_key_codes.py", *flags, *more, processes=processes)
            moves.append(movement(tmp_path / str(processes), 1, 2))
        assert_same_movement(*moves)
        grids = [np.array(Image.open(tmp_path / str(n) / "samples.png")).astype(int) for n in (1, 2)]
        assert np.abs(grids[0] - grids[1]).max() <= 2  # the same samples, to rounding


def test_key_codes_of_other_classes_are_others(trained, flags, tmp_path):
    flags = [*flags, "--key_codes_dir", trained[0] / "key_codes", "--output_dir", tmp_path, "--random_flip"]
    flags[flags.index("--class_conditional")] = "--no-class_conditional"
    flags = [flag for flag in flags if flag not in ("--min_class_images", 3)]
    with pytest.raises(ValueError, match="holds key codes of another .* or classes; delete it or name another folder"):
        train_here(train_key_codes.main, *flags)


def test_key_codes_without_labels(stage_two):
    with pytest.raises(FileNotFoundError, match="has key codes without labels; encode the collection with classes"):
        KeyCodeDataset(stage_two[0] / "key_codes", with_labels=True)
    assert len(KeyCodeDataset(stage_two[0] / "key_codes")) == 48


class TestDropout:
    def test_share(self):
        labels = torch.arange(10_000) % 7
        dropped = drop_labels(labels, 7, 0.1, seed=0, batch=3)
        assert 0.08 < (dropped == 7).float().mean() < 0.12
        assert torch.equal(dropped[dropped != 7], labels[dropped != 7])
        assert torch.equal(drop_labels(labels, 7, 0.0, 0, 3), labels)

    def test_it_follows_from_seed_and_batch(self):
        labels = torch.arange(64)
        whole = drop_labels(labels, 64, 0.5, 0, 3)
        assert torch.equal(whole, drop_labels(labels, 64, 0.5, 0, 3))
        assert not torch.equal(whole, drop_labels(labels, 64, 0.5, 0, 4))
        assert not torch.equal(whole, drop_labels(labels, 64, 0.5, 1, 3))
        parts = [drop_labels(part, 64, 0.5, 0, 3, rank, 4) for rank, part in enumerate(labels.split(16))]
        assert torch.equal(whole, torch.cat(parts))


def test_validation_images_show_all_classes():
    assert spread_labels(6, 3) == [0, 0, 1, 1, 2, 2]
    assert spread_labels(4, 9) == [0, 2, 4, 6]


def test_measured_images_have_the_classes_shares():
    labels = frequent_labels(400, {"common": 30, "none": 0, "rare": 10})
    assert labels == frequent_labels(400, {"common": 30, "none": 0, "rare": 10})
    assert set(labels) == {0, 2} and 70 < labels.count(2) < 130  # 100 expected, deviation 8.7


class TestFlags:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["--class_column", "kind"], "--class_column need classes; add --class_conditional or leave them out"),
            (["--balance_classes"], "--balance_classes need classes; add --class_conditional"),
            (["--class_conditional", "--class_dropout_prob", "1"], "must be from 0 to below 1, not 1"),
            (["--set", "unet.num_class_embeds=10"], "unet.num_class_embeds is 10; leave it out, --class_conditional"),
            (["--class_conditional", "--streaming"], "--streaming does not; leave one out"),
            (["--validation_metrics", "kid", "--streaming"], "--streaming does not; leave one out"),
        ],
    )
    def test_refusals(self, words, sentence, capsys):
        with pytest.raises(SystemExit):
            train_key_codes.parse_args(["--dataset_name", "x", "--autoencoder_name_or_path", "y", *words])
        assert sentence in capsys.readouterr().err

    def test_a_pretrained_pipeline_without_classes(self, pipe):
        args = argparse.Namespace(class_conditional=True, pretrained_model_name_or_path="runs/a")
        with pytest.raises(ValueError, match="runs/a is unconditional; leave --class_conditional out"):
            known_classes(args, pipe)
        args.class_conditional = False
        assert known_classes(args, pipe) is None is known_classes(args, None)
