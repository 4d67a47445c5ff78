"""What is recorded of a finished run, and reports of earlier weights beside it."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from brics_diffusers.training_utils.record import SUMMARY, finish_run, summarize_run


REPORT = {"protocol": "standard", "images": 1, "dataset_name": "a", "split": "b", "metrics": {}}
GRID_USAGE = "reports/grid-usage.json"  # which is not published


@pytest.fixture
def measured(pipe, tmp_path):
    """The folder of a run that has ended and was measured, and what ends it again."""
    args = argparse.Namespace(output_dir=str(tmp_path), hub_license=None, push_to_hub=False)
    pipe.save_pretrained(tmp_path)
    finish_run(args, {"steps": 4})
    (tmp_path / "reports").mkdir()
    for name in ("reports/reconstruct-metrics-paper", "reconstruct-metrics-standard"):
        (tmp_path / f"{name}.json").write_text(json.dumps(REPORT))
        (tmp_path / f"{name}.md").write_text("first")
        (tmp_path / f"{name}-images.png").write_text("")
    (tmp_path / GRID_USAGE).write_text("{}")
    return tmp_path, lambda: finish_run(args, {"steps": 8})


def files_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_reports_of_earlier_weights_are_set_aside(measured, pipe, caplog):
    folder, finish = measured
    reports = {name for name in files_in(folder) if "reconstruct-metrics" in name}
    torch.nn.init.zeros_(pipe.unet.conv_in.weight)
    pipe.save_pretrained(folder)
    finish()
    assert files_in(folder / "superseded-reports") == reports and not reports & files_in(folder)
    assert (folder / GRID_USAGE).exists() and "None were measured." in (folder / "README.md").read_text()
    names = "reconstruct-metrics-standard.json, reports/reconstruct-metrics-paper.json"
    assert f"{names}: of earlier weights, kept in {folder / 'superseded-reports'}; measure" in caplog.text

    # The next ones beside them.
    (folder / "reports/reconstruct-metrics-paper.json").write_text(json.dumps(REPORT))
    torch.nn.init.ones_(pipe.unet.conv_in.weight)
    pipe.save_pretrained(folder)
    finish()
    assert files_in(folder / "superseded-reports-1") == {"reports/reconstruct-metrics-paper.json"}
    assert files_in(folder / "superseded-reports") == reports


def test_reports_of_the_same_weights_stay(measured, pipe):
    folder, finish = measured
    pipe.save_pretrained(folder)
    before = files_in(folder)
    finish()
    assert files_in(folder) == before and json.loads((folder / SUMMARY).read_text())["steps"] == 8


@pytest.fixture
def summarize(tmp_path):
    """The summary of a run, given its flags."""
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="no", device="cpu")
    state = SimpleNamespace(global_step=1, images_seen=1, skipped_steps=0)

    def run(**flags) -> dict:
        args = argparse.Namespace(output_dir=str(tmp_path), **{"dataset_name": "me/emoji", **flags})
        return summarize_run(args, accelerator, state, 1, torch.nn.Linear(1, 1))

    return run


def test_a_folder_at_home_is_not_on_the_hub(summarize, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "emoji").mkdir()
    assert not summarize(dataset_name="~/emoji")["dataset_on_hub"]
    assert summarize(dataset_name="me/emoji")["dataset_on_hub"]


def test_stage_one_of_a_run_of_stage_two_alone(summarize, tmp_path, monkeypatch):
    (tmp_path / SUMMARY).write_text('{"steps": 7}')
    (tmp_path / "training_config.json").write_text('{"seed": 3}')
    monkeypatch.chdir(tmp_path)
    assert "autoencoder_training" not in summarize()
    stage_one = summarize(autoencoder_name_or_path=str(tmp_path))["autoencoder_training"]
    assert stage_one == {"steps": 7, "config": {"seed": 3}}


def test_stage_one_of_a_pipeline_that_gives_its_autoencoder(summarize, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / SUMMARY).write_text('{"steps": 9}')
    for flag in ("autoencoder_name_or_path", "pretrained_model_name_or_path"):
        (tmp_path / SUMMARY).write_text('{"steps": 9}')
        assert "autoencoder_training" not in summarize(**{flag: str(tmp_path)})  # 9 are steps of stage two
        (tmp_path / SUMMARY).write_text('{"steps": 9, "autoencoder_training": {"steps": 7, "config": {}}}')
        assert summarize(**{flag: str(tmp_path)})["autoencoder_training"] == {"steps": 7, "config": {}}
