import sys

import pytest
import torch

from brics_diffusers.commands import COMMANDS, main
from brics_diffusers.commands.shared import choose_device


def test_numbers_are_written_without_matplotlib(run_command, monkeypatch, caplog):
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


def test_batch_size(capsys):
    with pytest.raises(SystemExit):
        main(["grid-usage", "model", "--dataset_name", "images", "--batch_size", "0"])
    assert "argument --batch_size: must be at least 1, not 0" in capsys.readouterr().err
