"""A small saved model, and a way to run subcommands as a user does."""

import json

import pytest
import torch
from accelerate import PartialState
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder
from brics_diffusers.commands import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved autoencoder whose grids are as large as after training."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER)
    torch.nn.init.normal_(autoencoder.grids.entries)
    autoencoder.save_pretrained(folder)
    return folder


@pytest.fixture
def run_command(tmp_path, capsys):
    """Runs a subcommand in this process; the result of its JSON file, its Markdown text and its folder."""

    def run(name: str, *arguments, report: str | None = None):
        main([name, *map(str, arguments), "--output_dir", str(tmp_path)])
        report = report or name
        text = (tmp_path / f"{report}.md").read_text()
        assert capsys.readouterr().out.strip() in text  # what is printed is what is written
        result = json.loads((tmp_path / f"{report}.json").read_text())
        assert result["machine"]["torch"] == torch.__version__
        return result, text, tmp_path

    return run


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Commands run on the CPU, and leave the next test to choose its own device."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture
def saved_pipe(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"
