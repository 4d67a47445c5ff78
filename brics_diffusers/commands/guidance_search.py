"""Tries scales and intervals of guidance on a metric, and can make the best the pipeline's own.

For each interval of --guidance_intervals and each scale of --guidance_scales, --num_samples images are made, the same
noise for each, and compared with those of --dataset_name. Samples are kept, in a folder each, so that an interrupted
search goes on where it stopped; it runs on several processes as `generation-metrics` does. The smallest value is the
best, and the best of many values is too good by chance: measure it again with another --seed. --save writes it into
the pipeline's folder as what calls take by default, together with --num_inference_steps and --scheduler.

--guide tries another pipeline's UNet as the guide, trained on the same key codes, for less long, narrower or without
classes, and --save puts it into the pipeline, in place of what guide it has, if a scale above 1 is the best; samples
with different guides need different --output_dir.

--ema_lengths tries averages of the weights of these lengths besides, from the folder of a training with
--ema_snapshot_steps; --guidance_scales 1 tries nothing else. --save puts the best average in place of the weights and
renews the card, if there is one.
"""

import argparse
import copy
import functools
import inspect
import itertools
import json
import math
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors import safe_open

from ..hub.card import read_card, write_card
from ..metrics.generation import INCEPTION, KID_FEATURES, check_image_counts, generation_metrics, load_extractors
from ..pipelines import BricsKeyCodePipeline
from ..pipelines.guidance import check_guide
from ..pipelines.sampling import load_pipeline, load_samples
from ..training_utils.arguments import positive
from ..training_utils.checkpoints import appearing_folder, clean_up
from ..training_utils.post_hoc_ema import SNAPSHOTS, load_average, power_exponent, snapshot_files
from ..training_utils.record import SUMMARY, write_summary
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
    add("--guide", help="Pipeline, its folder or its name on the Hub, whose UNet guides in place of MODEL's guide.")
    add(
        "--ema_lengths",
        type=float,
        nargs="+",
        default=[None],
        metavar="LENGTH",
        help="Lengths of averages to try, relative to the training, at most 0.28. Default: the saved weights only.",
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


def settings(args: argparse.Namespace) -> list[tuple[float | None, float, tuple[float, float]]]:
    """Lengths, scales and intervals to try; without guidance only one interval."""
    found = itertools.product(args.ema_lengths, args.guidance_scales, args.guidance_intervals)
    return list(dict.fromkeys((length, scale, ALWAYS if scale == 1 else times) for length, scale, times in found))


def run(args: argparse.Namespace) -> None:
    """Makes the samples on all processes, compares on the first, and writes the report."""
    device, state = choose_device(args.device), PartialState()
    if args.save and not (Path(args.model) / "model_index.json").is_file():
        raise ValueError(f"--save needs a pipeline's folder to write into, and {args.model} is none; leave it out.")
    if args.save and state.is_main_process:
        clean_up(args.model)
    state.wait_for_everyone()
    check_model(args)
    guide = None if args.guide is None else load_guide(args)
    if state.is_main_process:  # what can fail does so before the samples are made
        cache_dir = make_output_folder(args.features_cache_dir or default_cache_dir(), "--features_cache_dir")
        real = read_collection(args)
        check_image_counts([args.metric], args.num_samples, len(real))
        features = args.feature_extractor
        extractors = load_extractors(
            [args.metric], features or INCEPTION, kid_extractor=features or KID_FEATURES, device=device
        )
    rows = []
    for length, scale, (low, high) in settings(args):
        options = copy.copy(args)
        options.guidance_scale, options.guidance_interval = scale, (low, high)
        label, tried = f"samples-{scale:g}-{low:g}-{high:g}", {}
        label += "" if length is None else f"-ema-{length:g}"
        folder = make_output_folder(Path(args.output_dir) / label)
        change = functools.partial(change_pipeline, args.model, length, guide, tried)
        sample_to_folder(options, args.model, folder, state, device, change)
        if state.is_main_process:
            reading = args.batch_size, args.dataloader_num_workers, device, cache_dir
            result = generation_metrics(load_samples(folder, args.num_samples), real, extractors, *reading)
            ((name, value),) = result["metrics"].items()
            rows.append(tried | {"guidance_scale": scale, "from": low, "to": high, name: value})
    if not state.is_main_process:
        return
    best = min(rows, key=lambda row: row[name])
    if args.save:
        save_best(args, best, guide)
        if read_card(args.model) is not None:
            write_card(args.model)
    found = {"model": args.model, "guide": args.guide, "dataset_name": args.dataset_name}
    found |= {
        "split": args.dataset_split,
        "metric": name,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "values": rows,
        "best": best,
    }
    guided = "" if args.guide is None else f" guided by `{args.guide}`"
    text = f"# Guidance\n\n`{args.model}`{guided}, {args.num_samples} samples of seed {args.seed} for each line.\n\n"
    average = f"an average of length {best['ema_length']:g} with " if "ema_length" in best else ""
    text += f"{markdown_table(rows)}\nThe best is {average}guidance_scale {best['guidance_scale']:g} at times "
    text += f"{best['from']:g} to {best['to']:g}{', which the pipeline now has' if args.save else ''}.\n"
    publish(args, "guidance-search", found, text, dict, device)


def check_model(args: argparse.Namespace) -> None:
    """A `ValueError` for what the pipeline's folder can't do, before samples are made."""
    folder, lengths = Path(args.model), [length for length in args.ema_lengths if length is not None]
    for length in lengths:
        power_exponent(length)  # refuses one that there is not
    if (folder / "model_index.json").is_file() and any(scale != 1 for scale in args.guidance_scales):
        content = json.loads((folder / "model_index.json").read_text())
        if not content.get("id2label") and not any(content.get("guide") or []) and args.guide is None:
            raise ValueError(f"{folder} has neither classes nor a guide; give --guide, or --guidance_scales 1.")
    snapshots = snapshot_files(folder / SNAPSHOTS)
    if lengths and snapshots and (folder / SUMMARY).is_file():
        last, steps = int(snapshots[-1].stem), json.loads((folder / SUMMARY).read_text())["steps"]
        if last != steps:
            raise ValueError(
                f"the snapshots of {folder} end at step {last} and the training at step {steps}; train with "
                "--ema_snapshot_steps to the end, or leave --ema_lengths out."
            )


@torch.no_grad()
def load_guide(args: argparse.Namespace) -> UNet2DModel:
    """The UNet of --guide; a `ValueError` if it predicts something else than the pipeline's, or of other key codes."""
    pipes = [load_pipeline(name) for name in (args.model, args.guide)]
    for pipe, name in zip(pipes, (args.model, args.guide), strict=True):
        if not isinstance(pipe, BricsKeyCodePipeline):
            raise ValueError(f"{name} is a {type(pipe).__name__}; --guide needs two pipelines of BRICS.")
    for (name, ours), theirs in zip(facts_of(pipes[0]).items(), facts_of(pipes[1]).values(), strict=True):
        if isinstance(ours, torch.Tensor):
            # Weights saved with 16 bits move key codes by less than this, and another encoder by far more.
            same = ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=0.02)
        else:
            same = ours == theirs or (name == "classes" and pipes[1].num_classes is None)
        if not same:
            raise ValueError(
                f"--guide {args.guide} has another {name} than {args.model}; train it on the same autoencoder, "
                f"--autoencoder_name_or_path {args.model}, with the same classes or none, scheduler and scaling."
            )
    check_guide(pipes[1].unet, pipes[0].unet)
    return pipes[1].unet


def facts_of(pipe: BricsKeyCodePipeline) -> dict:
    """What a UNet and its guide must agree on."""
    autoencoder = torch.nn.Module.float(pipe.autoencoder)
    image = torch.linspace(-1, 1, math.prod(autoencoder.sample_shape)).view(1, *autoencoder.sample_shape)
    return {
        "classes": pipe.class_names,
        "prediction_type": pipe.scheduler.config.prediction_type,
        "scaling_factor": autoencoder.scaling_factor,
        "noise schedule": pipe.scheduler.alphas_cumprod,
        "encoder": autoencoder.encode(image).key_codes,
    }


def change_pipeline(
    model: str, length: float | None, guide: UNet2DModel | None, tried: dict, pipe: DiffusionPipeline
) -> None:
    """
    Gives the pipeline a guide, and an average of the weights, whose length and how far its profile is off it notes in
    `tried`.
    """
    if guide is not None:
        # diffusers' own `to` warns of any type
        pipe.register_modules(guide=torch.nn.Module.to(guide, pipe.device, pipe.dtype))
    if length is not None:
        tried |= {"ema_length": length, "profile_error": load_average(pipe.unet, Path(model) / SNAPSHOTS, length)}


def save_best(args: argparse.Namespace, best: dict, guide: UNet2DModel | None) -> None:
    """Puts the best into the pipeline's folder: weights, as numbers of the same type, and defaults of calls."""
    folder, record, dtype = Path(args.model), {}, saved_dtype(args.model)
    if "ema_length" in best:
        pipe = load_pipeline(args.model)
        load_average(pipe.unet, folder / SNAPSHOTS, best["ema_length"])
        save_weights(pipe.unet, folder / "unet", dtype)
        record["ema_length"] = best["ema_length"]
    takes_guide = guide is not None and best["guidance_scale"] != 1
    if takes_guide:
        save_weights(guide, folder / "guide", dtype)
        record["guide"] = args.guide
    save_defaults(args, best["guidance_scale"], (best["from"], best["to"]), takes_guide)
    if record and (folder / SUMMARY).is_file():
        write_summary(folder, json.loads((folder / SUMMARY).read_text()) | record)


def saved_dtype(model: str) -> torch.dtype:
    """The type of the numbers in the files of a pipeline's UNet."""
    with safe_open(next((Path(model) / "unet").glob("*.safetensors")), "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def save_weights(unet: UNet2DModel, folder: Path, dtype: torch.dtype) -> None:
    """Puts a UNet into a part's folder, in place of what is there, complete or not at all."""
    with appearing_folder(folder) as partial:
        torch.nn.Module.to(unet, dtype).save_pretrained(partial)  # diffusers' own `to` warns of any type


def save_defaults(args: argparse.Namespace, scale: float, times: tuple[float, float], takes_guide: bool) -> None:
    """
    Writes what calls of a pipeline take by default into its folder: this guidance, and the steps and scheduler; with a
    guide, that there is one.
    """
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
        scheduler, trained = type(scheduler)(**known), load_pipeline(args.model).scheduler.config
        # Which a scheduler that has them takes over again, in sampling and where the training goes on.
        bounds = {name: trained[name] for name in ("clip_sample", "clip_sample_range") if name in trained}
        scheduler.register_to_config(**bounds)
        scheduler.save_pretrained(index.parent / "scheduler")
        if args.scheduler is not None:
            content["scheduler"] = ["diffusers", args.scheduler]
    if takes_guide:
        content["guide"] = ["diffusers", "UNet2DModel"]
    with atomic_write(index) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
