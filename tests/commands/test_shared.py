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


def test_batch_size(capsys):
    with pytest.raises(SystemExit):
        main(["grid-usage", "model", "--dataset_name", "images", "--batch_size", "0"])
    assert "argument --batch_size: must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["reconstruct-metrics", "model", "--dataset_name", "images"],
        ["grid-usage", "model", "--dataset_name", "images"],
        ["code-statistics", "model", "--dataset_name", "images"],
        ["schedules"],
        ["cost"],
        ["generation-metrics", "--generated", "model", "--dataset_name", "images"],
        ["nearest-neighbours", "--generated", "model", "--dataset_name", "images"],
        ["remote-code", "model"],
    ],
    ids=lambda words: words[0],
)
def test_output_folder_that_is_a_file(tmp_path, words):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"diffusers {words[0]}: --output_dir .*file is no folder that can be made"):
        main([*words, "--output_dir", str(tmp_path / "file")])
