"""Runs that are refused at the start."""

import pytest
import train_autoencoder
import train_key_codes
from launching import launch, train_here

from brics_diffusers.training_utils.processes import REFUSED_BACKENDS, WORLD_SIZES, check_world_size
from brics_diffusers.utils.locks import locked_folder


@pytest.fixture
def flags(image_folder, write_config, tmp_path):
    """The flags of a short run of stage one."""
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", tmp_path / "run"]
    return [*flags, "--max_train_steps", 1, "--num_validation_images", 0, "--adversarial_weight", 0]


def test_a_second_run_in_a_folder_changes_nothing(flags, tmp_path):
    for resume in ([], ["--resume_from_checkpoint", "latest"]):
        message = "process .* is at work in .*run; wait for its end, or name another --output_dir"
        with locked_folder(tmp_path / "run"), pytest.raises(BlockingIOError, match=message):
            train_here(train_autoencoder.main, *flags, *resume)
        assert list((tmp_path / "run").iterdir()) == []
    train_here(train_autoencoder.main, *flags)
    assert (tmp_path / "run/autoencoder").is_dir() and not list((tmp_path / "run").glob(".*"))


def test_a_run_that_fails_frees_its_folder(flags, tmp_path):
    with pytest.raises(ValueError, match="name its --pretrained_autoencoder_name_or_path"):
        train_here(train_autoencoder.main, *flags, "--train_decoder_only")
    with locked_folder(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_the_main_process_takes_the_lock_and_all_are_refused(flags, tmp_path):
    with locked_folder(tmp_path / "run"):
        done = launch("train_autoencoder.py", *flags, processes=2, check=False)
    assert done.returncode != 0 and done.stderr.count("BlockingIOError: process") >= 1


def test_key_codes_are_made_by_one_run(stage_one, image_folder, write_config, tmp_path):
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--autoencoder_name_or_path", stage_one[0]]
    flags += ["--key_codes_dir", tmp_path / "codes", "--max_train_steps", 1, "--num_validation_images", 0]
    message = "is at work in .*codes; wait for its end, or name another --key_codes_dir"
    with locked_folder(tmp_path / "codes"), pytest.raises(BlockingIOError, match=message):
        train_here(train_key_codes.main, *flags, "--output_dir", tmp_path / "one")
    train_here(train_key_codes.main, *flags, "--output_dir", tmp_path / "one")
    with locked_folder(tmp_path / "codes"):  # once they are complete, any number of runs reads them
        train_here(train_key_codes.main, *flags, "--output_dir", tmp_path / "two")


@pytest.mark.parametrize("variable", REFUSED_BACKENDS)
def test_backends_are_refused_by_name(variable, flags, tmp_path):
    with pytest.raises(ValueError, match=f"training does not work with {REFUSED_BACKENDS[variable]}, .*--multi_gpu"):
        train_here(train_autoencoder.main, *flags, **{variable: "true"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", WORLD_SIZES)
def test_processes_that_do_not_know_of_each_other(variable, monkeypatch):
    for name in WORLD_SIZES:
        monkeypatch.delenv(name, raising=False)
    check_world_size(1)
    monkeypatch.setenv(variable, "2")
    check_world_size(2)
    with pytest.raises(ValueError, match=f"{variable} is 2, but accelerate works with 1 of .*ACCELERATE_USE_CPU=true"):
        check_world_size(1)


def test_a_run_of_one_process_that_should_be_two(flags, tmp_path):
    # Without this variable of its own, accelerate heeds no other process on a CPU.
    variables = {"ACCELERATE_USE_CPU": "false", "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but accelerate works with 1 of these processes"):
        train_here(train_autoencoder.main, *flags, **variables)
    assert not (tmp_path / "run").exists()
