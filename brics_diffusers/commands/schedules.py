"""logSNR and loss weights of the three schedules over time, and what a noised key code decodes to.

The first needs no model. For the second name an autoencoder and a collection: its first images are encoded, their
latents noised as in training, and decoded.
"""

import argparse
import itertools

import torch
from tqdm.auto import tqdm

from ..analysis.noise_levels import decode_noised, schedule_curves
from ..analysis.plots import noised_plot, schedule_plot
from ..data import UnreadableLog
from ..metrics.reconstruction import image_batches
from ..schedulers import CosineVariantScheduler
from ..schedulers.scheduling_cosine_variant import GAMMA_SCHEDULES, PREDICTION_TYPES
from ..training_utils.arguments import positive
from ..utils.reports import markdown_table
from .shared import (
    MODEL_HELP,
    add_collection_arguments,
    add_run_arguments,
    choose_device,
    collection_facts,
    open_collection,
    open_model,
    origin_sentence,
    publish,
)


TABLE_TIMES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
PICTURE_TIMES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP} Left out, there are no pictures.")
    add_collection_arguments(parser, split="validation", required=False)
    parser.add_argument("--num_images", type=positive, default=2, help="Images to noise, the first of the collection.")
    parser.add_argument("--num_train_timesteps", type=positive, default=1000, help="Steps of the schedules.")
    parser.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="What is predicted.")
    parser.add_argument("--snr_gamma", type=float, default=5.0, help="Cap of min-SNR weighting.")
    add_run_arguments(parser, seed="the noise")


def run(args: argparse.Namespace) -> None:
    """Computes the curves, and writes `schedules`."""
    if (args.model is None) != (args.dataset_name is None):
        raise ValueError("pictures need both a model and --dataset_name; give both, or neither for the curves alone.")
    curves = schedule_curves(args.num_train_timesteps, args.prediction_type, args.snr_gamma)
    result = {"prediction_type": args.prediction_type, "snr_gamma": args.snr_gamma, "schedules": curves}
    device, decoded = choose_device(args.device), None
    if args.model is not None:
        decoded, facts = noised(args, device)
        result |= {"model": args.model, "seed": args.seed, "times": PICTURE_TIMES} | facts

    def draw():
        pictures = {} if decoded is None else {"noised": noised_plot(decoded, PICTURE_TIMES)}
        return {"log-snr": schedule_plot(curves, args.prediction_type, args.snr_gamma)} | pictures

    publish(args, "schedules", result, as_text(args, result), draw, device)


def noised(args: argparse.Namespace, device) -> tuple[dict, dict]:
    """Decoded noised codes by schedule, and what images they come from."""
    autoencoder, unreadable = open_model(args.model, device), UnreadableLog()
    dataset, loader = open_collection(args, autoencoder)
    batches = image_batches(loader, device, unreadable, progress=False)
    singles = itertools.chain.from_iterable(images.split(1) for images, _ in batches)
    images = torch.cat(list(itertools.islice(singles, args.num_images)))
    decoded = {}
    for name in tqdm(GAMMA_SCHEDULES, desc="Decoding", leave=False):
        scheduler = CosineVariantScheduler(args.num_train_timesteps, name)
        decoded[name] = decode_noised(autoencoder, images, scheduler, PICTURE_TIMES, args.seed).cpu()
    facts = collection_facts(args, dataset, autoencoder, unreadable)
    facts |= {"num_images": args.num_images, "images": len(images), "scaling_factor": autoencoder.scaling_factor}
    return decoded, facts


def as_text(args: argparse.Namespace, result: dict) -> str:
    """The Markdown report."""
    total, rows = args.num_train_timesteps, []
    for time, (name, curve) in itertools.product(TABLE_TIMES, result["schedules"].items()):
        step = max(round(time * total) - 1, 0)
        values = {"logSNR": curve["log_snr"][step], "weight with min-SNR": curve["min_snr_weight"][step]}
        rows.append({"t": curve["t"][step], "schedule": name} | values)
    heading = f"# Noise schedules\n\n{total} train steps; min-SNR-{args.snr_gamma:g} for {args.prediction_type}.\n"
    return "\n".join([heading, markdown_table(rows), *pictures_sentences(result)])


def pictures_sentences(result: dict) -> list[str]:
    """What the picture of noised codes shows, if there is one."""
    if "model" not in result:
        return []
    found, wanted = result["images"], result["num_images"]
    fewer = f" There are only {found} of the {wanted} images of --num_images." if found < wanted else ""
    noised = f"Key codes, scaled by {result['scaling_factor']:g}, noised and decoded; noise of seed {result['seed']}."
    return [f"{noised}{fewer} {origin_sentence(result)}"]
