"""The end of a training run: its summary, its card, and the push to the Hub."""

import argparse
import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator

from ..hub.card import CURVES, metric_files, write_card
from ..hub.published_files import model_folders
from ..hub.push import push
from ..utils.errors import first_line
from ..utils.files import free_path
from ..utils.reports import machine
from .checkpoints import RunState
from .curves import read_curves, training_plot


logger = logging.getLogger(__name__)

SUMMARY = "training_summary.json"


def summarize_run(
    args: argparse.Namespace, accelerator: Accelerator, state: RunState, num_images: int | None, model: torch.nn.Module
) -> dict:
    """
    How a run ended, for `training_summary.json`: what JSON can hold; with `autoencoder_training`, the summary of stage
    one, where that is at hand. The state's `validation`, if it has that, holds the last metrics.
    """
    summary = {
        "steps": state.global_step,
        "images_seen": state.images_seen,
        "hours": round(read_curves(args.output_dir)[1], 2),
        "skipped_steps": state.skipped_steps,
        "training_images": num_images,
        "dataset_on_hub": not os.path.exists(os.path.expanduser(args.dataset_name)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": getattr(state, "validation", None),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "machine": machine(accelerator.device),
    }
    stage_one, pretrained = map(vars(args).get, ("autoencoder_name_or_path", "pretrained_model_name_or_path"))
    source = stage_one or pretrained
    if source is not None and Path(source, SUMMARY).is_file():
        earlier = json.loads(Path(source, SUMMARY).read_text())
        if not is_pipeline(source):
            config = json.loads(Path(source, "training_config.json").read_text())
            summary["autoencoder_training"] = earlier | {"config": config}
        elif "autoencoder_training" in earlier:
            summary["autoencoder_training"] = earlier["autoencoder_training"]
    return summary


def is_pipeline(folder: str | os.PathLike) -> bool:
    """Whether a folder is a pipeline's, so that what it says of a training is about stage two."""
    return (Path(folder) / "model_index.json").is_file()


def finish_run(args: argparse.Namespace, summary: dict) -> None:
    """
    Writes the summary, the curves and the card into the run's folder, and pushes if `--push_to_hub` asks for it; an
    `OSError` if that fails says how to push the finished run. Reports of metrics that the run had when it ended
    earlier with other weights are kept in `superseded-reports`. Call on the main process, when everything else is
    saved.
    """
    output_dir = Path(args.output_dir)
    write_summary(output_dir, summary)
    stage_two, stage_one = hasattr(args, "autoencoder_name_or_path"), vars(args).get("autoencoder_name_or_path")
    draw_curves(output_dir, None if stage_one is None or is_pipeline(stage_one) else stage_one, stage_two)
    write_card(output_dir, args.hub_license)
    if not args.push_to_hub:
        return
    try:
        logger.info("Pushed: %s", push(output_dir, args.hub_model_id, args.hub_license))
    except Exception as error:  # whatever it is, the run is complete
        raise OSError(
            f"the run in {output_dir} is complete, but not pushed: {first_line(error)}; the command is "
            f"`brics-diffusers card {output_dir} --push_to_hub --hub_model_id {args.hub_model_id}`."
        ) from error


def write_summary(output_dir: Path, summary: dict) -> None:
    """Writes the summary with a digest of the weights; reports of metrics of other weights are set aside."""
    summary = summary | {"weights": _weights_digest(output_dir)}
    path = output_dir / SUMMARY
    if not path.is_file() or json.loads(path.read_text()).get("weights") != summary["weights"]:
        _set_reports_aside(output_dir)
    path.write_text(json.dumps(summary, indent=2) + "\n")


def _weights_digest(output_dir: Path) -> str:
    """SHA-256 of the files of weights that a run has saved."""
    digest = hashlib.sha256()
    for name in model_folders(output_dir):
        for path in sorted((output_dir / name).glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _set_reports_aside(output_dir: Path) -> None:
    """Moves what is published of metrics, with the tables and pictures beside it, to where it is not."""
    reports = metric_files(output_dir)
    if not reports:
        return
    folder = free_path(output_dir / "superseded-reports")
    for report in reports:
        for path in sorted(report.parent.glob(f"{report.stem}[.-]*")):
            target = folder / path.relative_to(output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    names = ", ".join(report.relative_to(output_dir).as_posix() for report in reports)
    logger.warning("%s: of earlier weights, kept in %s; measure the new ones.", names, folder)


def draw_curves(
    output_dir: str | os.PathLike, autoencoder_dir: str | os.PathLike | None = None, stage_two: bool = False
) -> None:
    """
    Writes `curves.png` into a run's folder, from what it and stage one, in `autoencoder_dir`, have logged; nothing
    where no step was logged or matplotlib is not installed. `stage_two` tells of a run of stage two whose stage one is
    not known.
    """
    folders = {} if autoencoder_dir is None else {"autoencoder": autoencoder_dir}
    folders["diffusion model" if folders or stage_two else "autoencoder"] = output_dir
    runs = {title: read_curves(folder)[0] for title, folder in folders.items()}
    runs = {title: curves for title, curves in runs.items() if "train/learning_rate" in curves}
    try:
        if runs:
            training_plot(runs).savefig(Path(output_dir) / CURVES, dpi=100)
    except ImportError as error:
        logger.info("No %s: %s", CURVES, error)
