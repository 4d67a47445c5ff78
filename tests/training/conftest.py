"""Runs of both stages."""

import logging
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from launching import CONFIG, launch


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """Writes `CONFIG` with changes, `{section: {name: value}}`, and returns the path."""

    def write(changes: dict | None = None) -> Path:
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        sections = {name: section | (changes or {}).get(name, {}) for name, section in CONFIG.items()}
        path.write_text(yaml.safe_dump(sections | {k: v for k, v in (changes or {}).items() if k not in sections}))
        return path

    return write


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Calls a training script's `main` with flags in this process, and returns what it printed to standard error."""
    handler, root = signal.getsignal(signal.SIGTERM), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(main, *flags) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        main(list(map(str, flags)))
        return capsys.readouterr().err

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    signal.signal(signal.SIGTERM, handler)
    root.handlers[:], root.level = handlers, level
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory, image_folder, write_config):
    """A finished run of stage one on one process: four steps, the adversarial loss from the third."""
    output_dir = tmp_path_factory.mktemp("stage-one")
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
    done = launch("train_autoencoder.py", *flags, "--gan_start_step", 2, "--checkpointing_steps", 2)
    return output_dir, done


@pytest.fixture(scope="session")
def stage_two(tmp_path_factory, image_folder, write_config, stage_one):
    """A finished run of stage two on one process."""
    output_dir = tmp_path_factory.mktemp("stage-two")
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
    done = launch("train_key_codes.py", *flags, "--autoencoder_name_or_path", stage_one[0], "--random_flip")
    return output_dir, done
