"""What all subcommands share: help, devices, processes, output folders, values that are refused."""

import sys

import pytest
import torch

from brics_diffusers.commands import COMMANDS, main
from brics_diffusers.commands.shared import choose_device


def test_numbers_are_written_without_matplotlib(run_command, monkeypatch, caplog):
    pytest.importorskip("torchmetrics")  # imports matplotlib itself where that is installed
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, _, folder = run_command("schedules", "--num_train_timesteps", 10)
    assert "No plots: plots need matplotlib; install it" in caplog.text
    assert not list(folder.glob("*.png"))


def test_help_lists_all_subcommands(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and all(name.replace("_", "-") in text for name in COMMANDS)


def test_device():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device tpu9 can't be used"):
        choose_device("tpu9")


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)  # with it, accelerate would wait for the other
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE is 2, but accelerate works with 1 of these processes"):
        choose_device(None)


MEASURE = ["reconstruct-metrics", "model", "--dataset_name", "images"]
GENERATED = ["nearest-neighbours", "--generated", "model", "--dataset_name", "images"]


@pytest.mark.parametrize(
    ("words", "flag", "value", "message"),
    [
        (MEASURE, "--batch_size", "0", "must be at least 1, not 0"),
        (MEASURE, "--dataloader_num_workers", "-1", "must be at least 0, not -1"),
        (MEASURE, "--seed", "-1", "must be at least 0, not -1"),
        (["schedules"], "--num_images", "0", "must be at least 1, not 0"),
        (GENERATED, "--num_samples", "0", "must be at least 1, not 0"),
        (GENERATED, "--num_neighbours", "0", "must be at least 1, not 0"),
        (
            GENERATED,
            "--scheduler_options",
            "[1]",
            "must be a JSON object such as '{\"use_karras_sigmas\": true}', not [1]",
        ),
        (GENERATED, "--scheduler_options", "banana", "must be a JSON object such as "),
    ],
)
def test_values_that_are_not_allowed(capsys, words, flag, value, message):
    with pytest.raises(SystemExit):
        main([*words, flag, value])
    assert f"argument {flag}: {message}" in capsys.readouterr().err


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="diffusers schedules: --output_dir .*file is no folder that can be made"):
        main(["schedules", "--output_dir", str(tmp_path / "file")])
