"""LPIPS, SSIM and PSNR of an autoencoder's reconstructions: mean and two standard deviations.

Runs on several processes under `accelerate launch --multi_gpu --num_processes N -m brics_diffusers.commands
reconstruct-metrics ...`; the result depends neither on their number nor on the batch size (to 1e-4 dB, rounding). On a
CPU put `ACCELERATE_USE_CPU=true` in front of that: with `--cpu` accelerate starts one process, whatever N is.
"""

import argparse
import textwrap
from importlib.metadata import version
from itertools import chain

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..data import UnreadableLog, evaluation_loader
from ..evaluation import (
    PROTOCOLS,
    gather_by_index,
    image_batches,
    reconstruct,
    reconstruction_metrics,
    summarize_metrics,
)
from ..perceptual import LPIPS_WEIGHTS, load_lpips
from ..reports import markdown_table
from ..visualization import side_by_side
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


__doc__ += "".join(f"\n{textwrap.fill(f'Protocol {name}: {text}', 119)}\n" for name, text in PROTOCOLS.items())

TITLES = {"lpips": "LPIPS", "ssim": "SSIM", "psnr": "PSNR (dB)"}
NUM_PICTURES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help=MODEL_HELP)
    add_collection_arguments(parser, split="validation")
    parser.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), default="standard", help="What is compared: see above."
    )
    parser.add_argument(
        "--lpips_network",
        choices=tuple(LPIPS_WEIGHTS),
        default="alex",
        help="Backbone of LPIPS; protocol paper has alex. Default: %(default)s.",
    )
    parser.add_argument("--no_lpips", action="store_true", help="Leave LPIPS out, for instance without its weights.")
    add_run_arguments(parser, seed="the perturbation of protocol paper")


def run(args: argparse.Namespace) -> None:
    """Measures on every process, gathers, and writes `reconstruct-metrics-<protocol>` on the first."""
    device, state = choose_device(args.device), PartialState()
    autoencoder = open_model(args.model, device)
    lpips_metric = None
    if not args.no_lpips:
        lpips_metric = load_lpips(args.lpips_network, remedy="leave LPIPS out: --no_lpips").to(device)
    resolution, unreadable = autoencoder.config.sample_size, UnreadableLog()
    with state.main_process_first():
        dataset, loader = open_collection(args, resolution, slice(state.process_index, None, state.num_processes))
    metrics = reconstruction_metrics(
        autoencoder, loader, lpips_metric, unreadable, state.is_main_process, args.protocol, args.seed
    )
    metrics = gather_by_index(metrics)
    names = chain.from_iterable(gather_object([unreadable.names]))
    if state.is_main_process:
        unreadable.add(names)
        result = describe(args, autoencoder, state.num_processes)
        result |= collection_facts(args, dataset, resolution, unreadable)
        result["metrics"] = summarize_metrics(metrics, unreadable)
        name = f"reconstruct-metrics-{args.protocol}"
        publish(args, name, result, as_text(result), lambda: {"images": picture(args, autoencoder, dataset)}, device)
    if state.num_processes > 1:
        state.destroy_process_group()


def describe(args: argparse.Namespace, autoencoder, num_processes: int) -> dict:
    """All that the figures depend on, apart from the images."""
    return {
        "model": args.model,
        "protocol": args.protocol,
        "description": PROTOCOLS[args.protocol],
        "seed": args.seed,
        "regularization": autoencoder.config.regularization,
        "key_noise_scale": autoencoder.key_noise_scale,
        "lpips_network": None if args.no_lpips else args.lpips_network,
        "batch_size": args.batch_size,
        "num_processes": num_processes,
        "torchmetrics": version("torchmetrics"),
        "lpips": version("lpips"),
    }


def as_text(result: dict) -> str:
    """The Markdown report."""
    row = {}
    for name in (name for name in TITLES if name in result["metrics"]):
        values = result["metrics"][name]
        row[TITLES[name]] = None if values["mean"] is None else f"{values['mean']:.4f} ± {values['two_std']:.4f}"
    left_out = {TITLES[name]: values["left_out"] for name, values in result["metrics"].items() if values["left_out"]}
    notes = [f"{count} images have no finite {name} and are left out of it." for name, count in left_out.items()]
    network, paper = result["lpips_network"], result["protocol"] == "paper"
    if network is None:
        notes.append("LPIPS was not measured: `--no_lpips` left it out.")
    else:
        notes.append(
            f"LPIPS is that of the network {network}" + (", not alex." if paper and network != "alex" else ".")
        )
    if paper:
        notes.append(f"The seed of the perturbation is {result['seed']}.")
    heading = f"# Reconstruction, protocol {result['protocol']}\n\nMean ± two standard deviations over images. "
    paragraphs = [heading + origin_sentence(result), markdown_table([row]), *notes, result["description"]]
    return "\n".join(paragraphs) + "\n"


@torch.no_grad()
def picture(args: argparse.Namespace, autoencoder, dataset):
    """Some of the first images above their reconstructions."""
    loader = evaluation_loader(dataset, autoencoder.config.sample_size, NUM_PICTURES)
    images, rows = next(image_batches(loader, autoencoder.device, progress=False))
    return side_by_side(images, reconstruct(autoencoder, images, rows, args.protocol == "paper", args.seed))
