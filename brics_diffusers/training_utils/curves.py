"""Curves of a run, read back from its TensorBoard logs and drawn."""

import json
import os
from pathlib import Path

from ..utils.plots import COLORS, new_figure


# What the training scripts log beside losses.
BOOKKEEPING = (
    "learning_rate",
    "encoder_learning_rate",
    "decoder_learning_rate",
    "grid_usage",
    "adaptive_gan_weight",
    "skipped_steps",
    "images_per_second",
    "data_wait_share",
    "peak_memory_mib",
)


def read_curves(output_dir: str | os.PathLike) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """
    Points (step, value) of the scalars that a run of either stage has logged, by names such as `"train/mse"` or
    `"validation/psnr"`, in the order of the steps; and the hours from the first entry to the last, summed over the
    pieces of a run that was interrupted. Where a run went on from an older checkpoint, points that it made again are
    left out, but not their hours; where it began afresh, nothing of what was before counts. Without logs: `{}`, 0.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    curves, seconds = {}, 0.0
    for path in sorted(log_folder(output_dir).glob("events.out.tfevents.*"), key=_first_time):
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "histograms": 1})
        accumulator.Reload()
        pieces = {name: accumulator.Scalars(name) for name in accumulator.Tags()["scalars"]}
        if not pieces:
            continue
        times = [event.wall_time for events in pieces.values() for event in events]
        start = min(events[0].step for events in pieces.values())
        curves = {name: [point for point in points if point[0] < start] for name, points in curves.items()}
        curves = {name: points for name, points in curves.items() if points}
        seconds = (seconds if curves else 0) + max(times) - min(times)
        for name, events in pieces.items():
            curves.setdefault(name, []).extend((event.step, event.value) for event in events)
    return curves, seconds / 3600


def log_folder(output_dir: str | os.PathLike) -> Path:
    """Where a run's TensorBoard logs are, by the `logging_dir` of its flags."""
    config = Path(output_dir, "training_config.json")
    flags = json.loads(config.read_text()) if config.is_file() else {}
    return Path(output_dir, flags.get("logging_dir", "logs"), "tensorboard")


def _first_time(path: Path) -> int:
    """Time in a file's name, `events.out.tfevents.TIME.HOST...`."""
    return int(path.name.split(".")[3])


def training_plot(runs: dict[str, dict[str, list[tuple[int, float]]]]):
    """
    Losses of runs, curves of `read_curves` by title, and what was measured at validations: PSNR on held-out images, or
    losses on held-out key codes and the distance of samples; for a run without any, the learning rate.
    """
    figure, rows = new_figure(2, len(runs))
    for (left, right), (title, curves) in zip(rows, runs.items(), strict=True):
        parts = {name.removeprefix("train/"): name for name in curves if name.startswith("train/")}
        losses = {part: name for part, name in parts.items() if part not in BOOKKEEPING}
        for color, (part, name) in zip(COLORS * len(losses), losses.items(), strict=False):
            left.plot(*zip(*curves[name], strict=True), color=color, linewidth=1, label=part)
        left.set(title=f"{title}: training", xlabel="step", ylabel="loss", yscale="log")
        left.legend(fontsize=8)
        if "validation/psnr" in curves:
            right.plot(*zip(*curves["validation/psnr"], strict=True), color=COLORS[0], marker=".")
            right.set(title=f"{title}: held-out images", xlabel="step", ylabel="PSNR (dB)")
        elif any(name.startswith("validation/") for name in curves):
            _plot_validation(right, curves)
            right.set(title=f"{title}: validation", xlabel="step")
        else:
            right.plot(*zip(*curves["train/learning_rate"], strict=True), color=COLORS[0])
            right.set(title=title, xlabel="step", ylabel="learning rate")
    return figure


def _plot_validation(axes, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Losses on held-out key codes, of all times t black, and on an axis of its own the distance of samples."""
    parts = {name.removeprefix("validation/"): name for name in curves if name.startswith("validation/")}
    losses = [part for part in parts if part.startswith("loss")]
    for part, color in zip(losses, ("black", *COLORS), strict=False):
        axes.plot(*zip(*curves[parts[part]], strict=True), color=color, linewidth=1, marker=".", label=part)
    if losses:
        axes.set(ylabel="loss", yscale="log")
        axes.legend(fontsize=8)
    for part in parts.keys() - set(losses):
        other = axes.twinx() if losses else axes
        other.plot(*zip(*curves[parts[part]], strict=True), color="gray", linestyle="--", marker=".")
        other.set_ylabel(f"{part} (dashed)" if losses else part)
