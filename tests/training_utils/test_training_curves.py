"""Curves that are read from the logs of a run, and drawn."""

import sys

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from brics_diffusers.training_utils.curves import read_curves, training_plot
from brics_diffusers.training_utils.record import draw_curves


def log(folder, steps, start, value):
    """One piece of a run: an entry every ten minutes."""
    with SummaryWriter(folder / "logs/tensorboard", filename_suffix=f".{start}") as writer:
        for count, step in enumerate(steps):
            for name in ("train/mse", "train/learning_rate", "validation/psnr"):
                writer.add_scalar(name, value + step, step, walltime=start + 600 * count)
    (path,) = (folder / "logs/tensorboard").glob(f"*.{start}")
    time, rest = path.name.removeprefix("events.out.tfevents.").split(".", 1)
    path.rename(path.with_name(f"events.out.tfevents.{start}.{rest}"))


@pytest.fixture
def interrupted(tmp_path):
    """A run that logged up to step 40, and went on from the checkpoint of step 20 the next day."""
    log(tmp_path, (30, 40, 50), start=200_000, value=1000.0)
    log(tmp_path, (10, 20, 30, 40), start=100_000, value=0.0)
    return tmp_path


def test_pieces_of_a_run_are_joined(interrupted):
    curves, hours = read_curves(interrupted)
    assert curves["train/mse"] == [(10, 10.0), (20, 20.0), (30, 1030.0), (40, 1040.0), (50, 1050.0)]
    assert curves.keys() == {"train/mse", "train/learning_rate", "validation/psnr"}
    assert hours == pytest.approx((3 * 600 + 2 * 600) / 3600)


def test_logs_in_another_folder(interrupted):
    (interrupted / "logs").rename(interrupted / "other")
    assert read_curves(interrupted) == ({}, 0)
    (interrupted / "training_config.json").write_text('{"logging_dir": "other"}')
    assert len(read_curves(interrupted)[0]["train/mse"]) == 5


def test_an_abandoned_run_does_not_count(tmp_path):
    log(tmp_path, (10, 20, 30), start=100_000, value=1000.0)
    log(tmp_path, (10, 20), start=200_000, value=0.0)
    curves, hours = read_curves(tmp_path)
    assert curves["train/mse"] == [(10, 10.0), (20, 20.0)] and hours == pytest.approx(1 / 6)


def test_without_matplotlib(interrupted, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw_curves(interrupted)
    assert not (interrupted / "curves.png").exists()


def test_a_folder_without_logs(tmp_path):
    assert read_curves(tmp_path) == ({}, 0)
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_a_row_for_each_stage(interrupted, tmp_path):
    stage_two = tmp_path / "stage-two"
    log(stage_two, (1, 2), start=300_000, value=0.5)
    draw_curves(interrupted)
    draw_curves(stage_two, interrupted)
    assert Image.open(interrupted / "curves.png").size == (1000, 360)
    assert Image.open(stage_two / "curves.png").size == (1000, 720)
    draw_curves(stage_two, None, stage_two=True)  # one that began with a published pipeline
    assert Image.open(stage_two / "curves.png").size == (1000, 360)


def test_validations_of_stage_two_are_drawn():
    curve = [(1, 0.5), (2, 0.4)]
    train = {"train/loss": curve, "train/learning_rate": curve}
    losses = {"validation/loss": curve, "validation/loss_t_0.00_0.25": curve}
    distance = {"validation/kid_random_conv": [(1, 500.0), (2, 300.0)]}
    for measured, left, right in (
        (losses | distance, ["loss", "loss_t_0.00_0.25"], "kid_random_conv (dashed)"),
        (losses, ["loss", "loss_t_0.00_0.25"], None),
        (distance, ["_child0"], "kid_random_conv"),
    ):
        axes = training_plot({"diffusion model": train | measured}).axes[1:]
        assert axes[0].get_title() == "diffusion model: validation"
        assert [line.get_label() for line in axes[0].lines] == left
        labels = [part.get_ylabel() for part in axes]
        assert labels == (["loss"] if left[0] == "loss" else []) + ([right] if right else [])
        if right:
            assert list(axes[-1].lines[0].get_ydata()) == [500, 300]
