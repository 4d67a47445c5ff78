"""Flags and set-up that commands on generated images share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..data import load_collection
from ..pipelines.sampling import (
    load_pipeline,
    load_samples,
    read_sample_settings,
    sample_images_to_folder,
    sample_label,
)
from ..training_utils.arguments import positive
from ..training_utils.record import SUMMARY
from ..utils.locks import locked_folder
from ..utils.reports import make_output_folder


def json_object(text: str) -> dict:
    """Type of a flag that takes named values as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"must be a JSON object such as '{{\"use_karras_sigmas\": true}}', not {text}"
        )
    return value


def add_generated_arguments(parser: argparse.ArgumentParser, num_samples: int) -> None:
    """Adds the flags that say where generated images come from; `num_samples` is the default number."""
    add = parser.add_argument
    add(
        "--generated",
        required=True,
        help="Pipeline (its folder, or its name on the Hub) to take samples of, or a folder of generated images.",
    )
    add(
        "--num_samples",
        type=positive,
        default=num_samples,
        help="Images to take samples of, or to use of a folder. Default: %(default)s.",
    )
    add(
        "--samples_dir",
        help="Folder for a pipeline's samples, one for all machines; `samples` in --output_dir by default.",
    )
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how samples are taken, and of what classes."""
    add = parser.add_argument
    add_solver_arguments(parser)
    add_class_argument(parser)
    add("--guidance_scale", type=float, help="1 is no guidance. Default: the pipeline's own.")
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="Times in [0, 1] between which to guide; 1 is noise. Default: the pipeline's own.",
    )


def add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for steps and scheduler."""
    add = parser.add_argument
    add("--num_inference_steps", type=positive, help="Denoising steps. Default: the pipeline's own, or 250.")
    add("--scheduler", help="Class of diffusers in place of the pipeline's scheduler.")
    add(
        "--scheduler_options",
        type=json_object,
        help="Arguments of the scheduler as JSON, such as '{\"use_karras_sigmas\": true}'.",
    )


def add_class_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--class_labels`, which [`chosen_classes`] reads."""
    parser.add_argument(
        "--class_labels",
        nargs="+",
        metavar="CLASS",
        help="Classes of the samples in turn, by name or number; `all` for all in turn, `training` to draw them as "
        "often as training images have them.",
    )


def chosen_classes(words: list[str] | None, pipe: DiffusionPipeline, name_or_path: str) -> list | dict | None:
    """
    The words of `--class_labels` as [`sample_label`] takes them; a `ValueError` if the pipeline has no classes, or its
    training is to be followed and has no record of them.
    """
    names = getattr(pipe, "labels", {})
    if words is None or not getattr(pipe, "num_classes", None):
        return words  # which the pipeline refuses, if there are any
    if words == ["all"] and "all" not in names:
        return list(range(pipe.num_classes))
    if words == ["training"] and "training" not in names:
        path = Path(name_or_path) / SUMMARY
        counts = json.loads(path.read_text()).get("class_images") if path.is_file() else None
        if not counts:
            raise ValueError(f"{name_or_path} has no {SUMMARY} with class_images; name classes, or `all`.")
        return counts
    return [int(word) if word.isdecimal() and word not in names else word for word in words]


def is_image_folder(args: argparse.Namespace) -> bool:
    """Whether `--generated` is a folder of images rather than a pipeline."""
    folder = Path(args.generated).expanduser()
    return folder.is_dir() and not (folder / "model_index.json").is_file()


def make_samples(args: argparse.Namespace, state: PartialState, device: torch.device) -> Path:
    """
    Makes what samples are missing, on all processes, or finds that images are given; returns their folder. A
    `BlockingIOError` if another command is making samples there.
    """
    if is_image_folder(args):
        return Path(args.generated).expanduser()
    folder = Path(args.samples_dir or Path(args.output_dir) / "samples")
    make_output_folder(folder, "--samples_dir")
    return sample_to_folder(args, args.generated, folder, state, device)


def sample_to_folder(
    args: argparse.Namespace,
    name_or_path: str,
    folder: Path,
    state: PartialState,
    device: torch.device,
    change: Callable[[DiffusionPipeline], None] | None = None,
) -> Path:
    """
    Makes what samples are missing, on all processes, with a bar for the samples and one for the steps of a batch;
    returns the folder. The flags are those of [`add_sampling_arguments`], and `num_samples`, `batch_size` and `seed`;
    `change` may change the pipeline, for instance its weights, before it makes samples.
    """
    guidance = {"guidance_scale": args.guidance_scale, "guidance_interval": args.guidance_interval}
    with locked_folder(folder, "--samples_dir", state.is_main_process):
        pipe = load_pipeline(name_or_path, args.scheduler, args.scheduler_options, device)
        if change is not None:
            change(pipe)
        pipe.set_progress_bar_config(disable=not state.is_main_process, desc="Denoising", leave=False)
        sample_images_to_folder(
            pipe,
            folder,
            args.num_samples,
            args.batch_size,
            args.num_inference_steps or pipe.config.get("default_num_inference_steps", 250),
            args.seed,
            state.process_index,
            state.num_processes,
            progress=state.is_main_process,
            class_labels=chosen_classes(args.class_labels, pipe, name_or_path),
            **{name: value for name, value in guidance.items() if value is not None},
        )
        state.wait_for_everyone()
    return folder


def load_generated(args: argparse.Namespace, folder: Path) -> tuple[datasets.Dataset, dict]:
    """
    The collection of generated images in the folder of [`make_samples`], and where they come from: `"source"`,
    `"folder"` and, where they are known, `"sampling"`, the settings of the samples.
    """
    if is_image_folder(args):
        dataset = load_collection(folder, max_images=args.num_samples)
    else:
        dataset = load_samples(folder, args.num_samples)
    return dataset, {"source": args.generated, "folder": str(folder), "sampling": read_sample_settings(folder)}


def class_names(args: argparse.Namespace) -> dict[int, str]:
    r"""
    Names of the classes of `--generated` by number, where samples will be of known classes.

    Args:
        args (`argparse.Namespace`): Flags of [`add_generated_arguments`].

    Raises:
        `ValueError`: If it has none, or its samples are of no class in particular.
    """
    config = {} if is_image_folder(args) else DiffusionPipeline.load_config(args.generated)
    if not config.get("id2label"):
        raise ValueError(f"--by_class needs a pipeline with classes, and {args.generated} is none; leave it out.")
    if args.class_labels is None and config.get("default_class_weights") is None:
        raise ValueError("--by_class needs samples of known classes; give --class_labels all, or training, or names.")
    return {int(number): name for number, name in config["id2label"].items()}


def sample_classes(sampling: dict, num_samples: int, names: dict[int, str]) -> list[str | None]:
    r"""
    The class of each sample.

    Args:
        sampling (`dict`): Result of [`read_sample_settings`], of samples with classes.
        num_samples (`int`): Number of samples.
        names (`dict[int, str]`): Result of [`class_names`].

    Returns:
        `list[str]`: names, `None` for no class in particular.
    """
    known = {None: None} | {name: name for name in names.values()}
    labels = [sample_label(sampling["class_labels"], sampling["seed"], index) for index in range(num_samples)]
    return [known[label] if label in known else names[int(label)] for label in labels]  # JSON's keys are strings
