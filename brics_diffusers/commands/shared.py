"""Flags and steps that several subcommands share."""

import argparse
import logging
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..data import UnreadableLog, collection_fingerprint, evaluation_loader, load_collection
from ..data.image_modes import MODES
from ..models import BricsAutoencoder
from ..models.loading import load_autoencoder
from ..training_utils.arguments import add_dataset_arguments, not_negative, positive
from ..training_utils.processes import check_world_size
from ..utils.reports import machine, write_report
from ..utils.sizes import size_text


logger = logging.getLogger(__name__)

MODEL_HELP = "Autoencoder: a saved one, a run of training, a pipeline, or a name on the Hub."


def add_collection_arguments(parser: argparse.ArgumentParser, split: str, required: bool = True) -> None:
    """Adds the flags that say which images to read, with the names they have in the training scripts."""
    add = parser.add_argument
    add_dataset_arguments(parser, required=required)
    add(
        "--dataset_split",
        default=split,
        help="Split to read; a plain folder of images is all `train`. Default: %(default)s.",
    )
    add("--max_images", type=positive, help="Use the first images of the collection only.")
    add("--batch_size", type=positive, default=16, help="Images in a batch; has no influence on results.")
    add("--dataloader_num_workers", type=not_negative, default=0, help="Processes that read data.")


def add_run_arguments(
    parser: argparse.ArgumentParser, seed: str | None = None, output_dir: str = "runs/reports"
) -> None:
    """Adds the flags for where to compute and where to write, and `--seed` if something is drawn."""
    if seed is not None:
        parser.add_argument("--seed", type=not_negative, default=0, help=f"Seed of {seed}, not negative.")
    add_device_argument(parser)
    parser.add_argument("--output_dir", default=output_dir, help="Folder for the results. Default: %(default)s.")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, which [`choose_device`] reads."""
    parser.add_argument("--device", help="For instance cpu or cuda:1; by default what accelerate chooses.")


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`, or this process's own; a `ValueError` for one that can't be used."""
    # Unlike Accelerator, PartialState does not read this variable, and without it CPU processes don't find each other.
    cpu = name == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(hours=2))  # the slowest process may be as late as that
    check_world_size(state.num_processes)
    if name is None:
        return state.device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} can't be used ({reason}); give cpu, or cuda with a GPU.") from error


def open_model(name_or_path: str, device: torch.device) -> BricsAutoencoder:
    """The autoencoder of a command line, in eval mode."""
    return load_autoencoder(name_or_path).to(device).eval()


def read_collection(args: argparse.Namespace):
    """The `datasets.Dataset` of [`add_collection_arguments`]."""
    return load_split(args, args.dataset_split, args.max_images)


def load_split(args: argparse.Namespace, split: str, max_images: int | None = None):
    """A split of the same collection, whatever `--dataset_split` says."""
    options = {"max_images": max_images, "config_name": args.dataset_config_name}
    return load_collection(args.dataset_name, split, args.image_column, args.cache_dir, **options)


def open_collection(args: argparse.Namespace, autoencoder: BricsAutoencoder, rows: slice = slice(None)):
    """
    The `datasets.Dataset` of a command line, and a `DataLoader` over some of its rows, of images as the model takes
    them.
    """
    dataset = read_collection(args)
    rows = range(len(dataset))[rows]
    channels, *size = autoencoder.sample_shape
    options = {"rows": rows, "channels": channels}
    return dataset, evaluation_loader(dataset, size, args.batch_size, args.dataloader_num_workers, **options)


def collection_facts(
    args: argparse.Namespace, dataset, autoencoder: BricsAutoencoder, unreadable: UnreadableLog
) -> dict:
    """What a result says of the images that it was computed from."""
    channels, *size = autoencoder.sample_shape
    shape = "square" if size[0] == size[1] else "rectangle"
    kind = "" if channels == 3 else f"{MODES[channels]}, "
    return {
        "dataset_name": args.dataset_name,
        "split": args.dataset_split,
        "fingerprint": collection_fingerprint(dataset),
        "images": len(dataset) - unreadable.count,
        "unreadable": unreadable.names,
        "preprocessing": f"central {shape}, Lanczos to {size_text(size)}, {kind}[-1, 1]",
    }


def origin_sentence(result: dict) -> str:
    """The same for people, with the model: `result` has [`collection_facts`] and `"model"`."""
    skipped = len(result["unreadable"])
    files = "file was" if skipped == 1 else "files were"
    note = f" {skipped} {files} unreadable and skipped." if skipped else ""
    images = f"{result['images']} images of `{result['dataset_name']}` ({result['split']})"
    return f"Autoencoder `{result['model']}`. {images}: {result['preprocessing']}.{note}\n"


def publish(
    args: argparse.Namespace, name: str, result: dict, text: str, draw: Callable[[], dict], device="cpu"
) -> None:
    """
    Writes a report with the machine that it comes from, and prints its text; `result` has `"machine"` if it has more
    to say of it. `draw` returns the figures by name: if matplotlib is missing, the rest is written without them.
    """
    try:
        figures = draw()
    except ImportError as error:
        logger.warning("No plots: %s", error)
        figures = {}
    write_report(args.output_dir, name, {"machine": machine(device)} | result, text, figures)
    print(text)
    print(f"Written to {args.output_dir}/{name}.*", file=sys.stderr)
