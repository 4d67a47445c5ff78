"""Both training scripts push to a Hub on loopback, see hub_server.py."""

import subprocess

import pytest
import train_autoencoder
import yaml
from launching import command, train_here
from small_models import ROOT

from brics_diffusers import BricsKeyCodePipeline


@pytest.fixture
def train(hub, tmp_path, image_folder, write_config):
    """Runs a training script whose Hub is the server."""

    def run(script, *flags, token="hf_writer"):
        flags = ["--config", write_config(), "--dataset_name", image_folder, "--push_to_hub", *flags]
        variables = hub.client_environment(tmp_path / "hf-home") | {"HF_TOKEN": token}
        words = command(script, *flags, launcher=False)
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=variables)

    return run


def test_a_repository_that_takes_no_push_ends_the_run_at_its_start(image_folder, write_config, tmp_path, monkeypatch):
    def refuse(name, private):
        raise OSError(f"{name} can't take a push")

    monkeypatch.setattr("brics_diffusers.training_utils.run.open_repository", refuse)
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", tmp_path / "run"]
    with pytest.raises(OSError, match="run can't take a push"):
        train_here(train_autoencoder.main, *flags, "--push_to_hub")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_wrong_login_ends_the_run_at_its_start(hub, train, tmp_path):
    done = train("train_autoencoder.py", "--output_dir", tmp_path / "run", token="hf_reader")
    assert done.returncode == 1 and not (tmp_path / "run").exists() and not hub.repositories
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"OSError: run at {hub.endpoint} can't take a push (403 Forbidden")
    assert message.endswith("a token that may write there, or leave --push_to_hub out.")


@pytest.mark.slow
def test_both_stages(hub, train, tmp_path):
    stage_one, pipeline = tmp_path / "my-autoencoder", tmp_path / "pipeline"
    done = train("train_autoencoder.py", "--output_dir", stage_one, "--hub_private_repo")
    assert done.returncode == 0, done.stderr[-4000:]
    repository = hub.repositories["user/my-autoencoder"]
    models = ["autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"]
    records = ["training_config.json", "training_summary.json"]
    assert repository.private
    assert sorted(repository.files()) == sorted(["README.md", *models, *records, "curves.png", "reconstructions.png"])
    card = repository.files()["README.md"].decode()
    assert "| steps | 4 |" in card and "validation of the run, step 4" in card and "# my-autoencoder" in card

    # The autoencoder comes from the Hub.
    flags = ["--autoencoder_name_or_path", "user/my-autoencoder", "--output_dir", pipeline]
    flags += ["--hub_model_id", "user/faces", "--hub_license", "cc0-1.0"]
    done = train("train_key_codes.py", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    files = hub.repositories["user/faces"].files()
    models += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
    assert sorted(files) == sorted(["README.md", "model_index.json", *models, *records, "curves.png", "samples.png"])
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["license"] == "cc0-1.0"
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert {path.name for path in pipeline.iterdir()} > {"checkpoint-4", "key_codes", "logs"}  # which stayed here
    BricsKeyCodePipeline.from_pretrained(pipeline)
