"""Tries scales and intervals of guidance on a metric, and can make the best the pipeline's own.

For each interval of --guidance_intervals and each scale of --guidance_scales, --num_samples images are made, the same
noise for each, and compared with those of --dataset_name. Samples are kept, in a folder each, so that an interrupted
search goes on where it stopped; it runs on several processes as `generation-metrics` does. The smallest value is the
best, and the best of many values is too good by chance: measure it again with another --seed. --save writes it into
the pipeline's folder as what calls take by default, together with --num_inference_steps and --scheduler.
"""

import argparse
import copy
import inspect
import itertools
import json
import math
from pathlib import Path

from accelerate import PartialState

from ..metrics.generation import INCEPTION, KID_FEATURES, check_image_counts, generation_metrics, load_extractors
from ..pipelines.sampling import load_pipeline, load_samples
from ..training_utils.arguments import positive
from ..utils.files import atomic_write, default_cache_dir
from ..utils.reports import make_output_folder, markdown_table
from .generated import add_class_argument, add_solver_arguments, sample_to_folder
from .shared import add_collection_arguments, add_run_arguments, choose_device, publish, read_collection


ALWAYS = (0.0, 1.0)


def interval(text: str) -> tuple[float, float]:
    """Type of a flag for an interval of times: `low:high` in [0, 1]."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"must be two times in [0, 1] such as 0.2:0.8, not {text}")
    return low, high


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    add = parser.add_argument
    add("model", help="Pipeline with classes or a guide: its folder, or its name on the Hub.")
    add("--guidance_scales", type=float, nargs="+", default=[1, 1.25, 1.5, 2, 3], help="Default: %(default)s.")
    add(
        "--guidance_intervals",
        type=interval,
        nargs="+",
        default=[ALWAYS, (0.0, 0.6), (0.2, 0.8)],
        metavar="LOW:HIGH",
        help="Times in [0, 1] between which to guide; 1 is noise. Default: 0:1 0:0.6 0.2:0.8.",
    )
    add("--metric", choices=("kid", "fid", "clip-fid"), default="kid", help="Default: %(default)s.")
    add(
        "--feature_extractor",
        metavar="NAME",
        help=f"Features of KID and FID, as of `generation-metrics`. Default: {KID_FEATURES} and {INCEPTION}.",
    )
    add("--features_cache_dir", help="Folder for features of real images; ~/.cache/brics_diffusers by default.")
    add("--num_samples", type=positive, default=2000, help="Images of each setting. Default: %(default)s.")
    add("--save", action="store_true", help="Write the best into the pipeline's folder.")
    add_solver_arguments(parser)
    add_class_argument(parser)
    add_collection_arguments(parser, split="train")
    add_run_arguments(parser, seed="the samples", output_dir="runs/guidance")


def settings(args: argparse.Namespace) -> list[tuple[float, tuple[float, float]]]:
    """Scales and intervals to try; without guidance only once."""
    pairs = itertools.product(args.guidance_scales, args.guidance_intervals)
    return list(dict.fromkeys((scale, ALWAYS if scale == 1 else times) for scale, times in pairs))


def run(args: argparse.Namespace) -> None:
    """Makes the samples on all processes, compares on the first, and writes the report."""
    device, state = choose_device(args.device), PartialState()
    if args.save and not (Path(args.model) / "model_index.json").is_file():
        raise ValueError(f"--save needs a pipeline's folder to write into, and {args.model} is none; leave it out.")
    if state.is_main_process:  # what can fail does so before the samples are made
        cache_dir = make_output_folder(args.features_cache_dir or default_cache_dir(), "--features_cache_dir")
        real = read_collection(args)
        check_image_counts([args.metric], args.num_samples, len(real))
        features = args.feature_extractor
        extractors = load_extractors(
            [args.metric], features or INCEPTION, kid_extractor=features or KID_FEATURES, device=device
        )
    rows = []
    for scale, (low, high) in settings(args):
        options = copy.copy(args)
        options.guidance_scale, options.guidance_interval = scale, (low, high)
        folder = make_output_folder(Path(args.output_dir) / f"samples-{scale:g}-{low:g}-{high:g}")
        sample_to_folder(options, args.model, folder, state, device)
        if state.is_main_process:
            reading = args.batch_size, args.dataloader_num_workers, device, cache_dir
            result = generation_metrics(load_samples(folder, args.num_samples), real, extractors, *reading)
            ((name, value),) = result["metrics"].items()
            rows.append({"guidance_scale": scale, "from": low, "to": high, name: value})
    if not state.is_main_process:
        return
    best = min(rows, key=lambda row: row[name])
    if args.save:
        save_defaults(args, best["guidance_scale"], (best["from"], best["to"]))
    found = {"model": args.model, "dataset_name": args.dataset_name, "split": args.dataset_split, "metric": name}
    found |= {"num_samples": args.num_samples, "seed": args.seed, "values": rows, "best": best}
    text = f"# Guidance\n\n`{args.model}`, {args.num_samples} samples of seed {args.seed} for each line.\n\n"
    text += f"{markdown_table(rows)}\nThe best is guidance_scale {best['guidance_scale']:g} at times "
    text += f"{best['from']:g} to {best['to']:g}{', which the pipeline now has' if args.save else ''}.\n"
    publish(args, "guidance-search", found, text, dict, device)


def save_defaults(args: argparse.Namespace, scale: float, times: tuple[float, float]) -> None:
    """Writes what calls of a pipeline take by default into its folder: this guidance, and the steps and scheduler."""
    index = Path(args.model) / "model_index.json"
    content = json.loads(index.read_text())
    content |= {"default_guidance_scale": scale, "default_guidance_interval": list(times)}
    if args.num_inference_steps is not None:
        content["default_num_inference_steps"] = args.num_inference_steps
    if args.scheduler is not None or args.scheduler_options:
        scheduler = load_pipeline(args.model, args.scheduler, args.scheduler_options).scheduler
        # Loading would warn of what only the scheduler of training knows.
        arguments = inspect.signature(type(scheduler).__init__).parameters
        known = {name: value for name, value in scheduler.config.items() if name in arguments}
        type(scheduler)(**known).save_pretrained(index.parent / "scheduler")
        if args.scheduler is not None:
            content["scheduler"] = ["diffusers", args.scheduler]
    with atomic_write(index) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
