"""Runs of both stages."""

from pathlib import Path

import pytest
import train_autoencoder
import train_key_codes
import yaml
from launching import CONFIG, train_here


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """Writes `CONFIG` with changes, `{section: {name: value}}`, and returns the path."""

    def write(changes: dict | None = None) -> Path:
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        sections = {name: section | (changes or {}).get(name, {}) for name, section in CONFIG.items()}
        path.write_text(yaml.safe_dump(sections | {k: v for k, v in (changes or {}).items() if k not in sections}))
        return path

    return write


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory, image_folder, write_config):
    """A finished run of stage one, four steps, the adversarial loss from the third; its folder and what it printed."""
    output_dir = tmp_path_factory.mktemp("stage-one")
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
    printed = train_here(train_autoencoder.main, *flags, "--gan_start_step", 2, "--checkpointing_steps", 2)
    return output_dir, printed


@pytest.fixture(scope="session")
def stage_two(tmp_path_factory, image_folder, write_config, stage_one):
    """A finished run of stage two; its folder and what it printed."""
    output_dir = tmp_path_factory.mktemp("stage-two")
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
    flags += ["--autoencoder_name_or_path", stage_one[0], "--random_flip"]
    return output_dir, train_here(train_key_codes.main, *flags)
