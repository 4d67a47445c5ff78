"""LPIPS, SSIM and PSNR of an autoencoder's reconstructions: mean and two standard deviations.

With --feature_extractor also rFID, the Fréchet distance between features of the images and of their reconstructions,
and KID, the unbiased squared MMD with the kernel (x.y / d + 1)^3, times 1,000, of reconstructions and of the images
themselves from random images of --reference_split. Their names say of which features they are.

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

from ..data import UnreadableLog, collection_fingerprint, evaluation_loader
from ..metrics.feature_distances import (
    FEW_IMAGES,
    check_count,
    collection_features,
    gather_features,
    reconstruction_distances,
    reconstruction_features,
)
from ..metrics.feature_extractors import extractor_description, load_feature_extractor
from ..metrics.perceptual import PERCEPTUAL_NETWORKS, load_perceptual_network
from ..metrics.reconstruction import (
    PROTOCOLS,
    gather_by_index,
    image_batches,
    reconstruct,
    reconstruction_metrics,
    summarize_metrics,
)
from ..training_utils.arguments import positive
from ..utils.image_grids import side_by_side
from ..utils.reports import markdown_table
from .shared import (
    MODEL_HELP,
    add_collection_arguments,
    add_run_arguments,
    choose_device,
    collection_facts,
    load_split,
    open_collection,
    open_model,
    origin_sentence,
    publish,
)


__doc__ += "".join(f"\n{textwrap.fill(f'Protocol {name}: {text}', 119)}\n" for name, text in PROTOCOLS.items())

TITLES = {
    "lpips": "LPIPS",
    "perceptual_efficientnet_lite0": "perceptual distance (efficientnet-lite0)",
    "ssim": "SSIM",
    "psnr": "PSNR (dB)",
}
NUM_PICTURES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help=MODEL_HELP)
    add_collection_arguments(parser, split="validation")
    parser.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), default="standard", help="What is compared: see above."
    )
    parser.add_argument(
        "--perceptual_network",
        "--lpips_network",
        choices=PERCEPTUAL_NETWORKS,
        default="alex",
        help="Backbone of LPIPS (protocol paper has alex), or efficientnet-lite0 for a like distance that is no LPIPS "
        "(extra learned-features). Default: %(default)s.",
    )
    parser.add_argument(
        "--no_perceptual",
        "--no_lpips",
        action="store_true",
        help="Leave the perceptual distance out, for instance without its weights.",
    )
    parser.add_argument(
        "--feature_extractor",
        metavar="NAME",
        help="Also compute rFID and KID, of these features: efficientnet-lite2 or efficientnet-lite0 (extras "
        "metrics and learned-features), a name of torch-fidelity's registry, or random-conv. By default neither.",
    )
    parser.add_argument(
        "--reference_split", default="train", help="Split that KID compares with. Default: %(default)s."
    )
    parser.add_argument(
        "--num_reference_images",
        type=positive,
        default=1500,
        help="So many random images of it, by --seed, or all if there are fewer. Default: %(default)s.",
    )
    add_run_arguments(parser, seed="the perturbation of protocol paper and of the choice of reference images")


def run(args: argparse.Namespace) -> None:
    """Measures on every process, gathers, and writes `reconstruct-metrics-<protocol>` on the first."""
    device, state = choose_device(args.device), PartialState()
    autoencoder = open_model(args.model, device)
    metric = None
    if not args.no_perceptual:
        metric = load_perceptual_network(args.perceptual_network, remedy="leave it out: --no_perceptual").to(device)
    extractor = None if args.feature_extractor is None else load_feature_extractor(args.feature_extractor, device)
    unreadable = UnreadableLog()
    with state.main_process_first():
        dataset, loader = open_collection(args, autoencoder, slice(state.process_index, None, state.num_processes))
        references = None if extractor is None else open_references(args)
    metrics = reconstruction_metrics(
        autoencoder, loader, metric, unreadable, state.is_main_process, args.protocol, args.seed
    )
    metrics = gather_by_index(metrics)
    reasons = dict(chain.from_iterable(gather_object([list(unreadable.reasons.items())])))
    if extractor is not None:
        features, skipped = gather_all_features(args, autoencoder, loader, extractor, *references)
    if state.is_main_process:
        unreadable.add(reasons, reasons)
        result = describe(args, autoencoder, state.num_processes)
        result |= collection_facts(args, dataset, autoencoder, unreadable)
        result["metrics"] = summarize_metrics(metrics, unreadable)
        result["feature_distances"] = None
        if extractor is not None:
            result["feature_distances"] = {
                "extractor": extractor_description(extractor),
                "metrics": reconstruction_distances(*features, extractor),
                "reference_split": args.reference_split,
                "reference_fingerprint": collection_fingerprint(references[0]),
                "reference_images": len(features[-1]),
                "reference_unreadable": skipped,
            }
        name = f"reconstruct-metrics-{args.protocol}"
        publish(args, name, result, as_text(result), lambda: {"images": picture(args, autoencoder, dataset)}, device)
    if state.num_processes > 1:
        state.destroy_process_group()


def open_references(args: argparse.Namespace) -> tuple:
    """The collection to compare with, and the rows of the random images of it; faults show before any work."""
    import torch_fidelity  # noqa: F401, PLC0415 - rFID needs it

    dataset = load_split(args, args.reference_split)
    check_count("kid", 2, reference=min(len(dataset), args.num_reference_images))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
    return dataset, sorted(order[: args.num_reference_images].tolist())


def gather_all_features(args: argparse.Namespace, autoencoder, loader, extractor, dataset, rows: list[int]) -> tuple:
    """Features of originals, reconstructions and references on all processes, and the unreadable references."""
    state, unreadable = PartialState(), UnreadableLog()
    progress, (channels, *size) = state.is_main_process, autoencoder.sample_shape
    rows = rows[state.process_index :: state.num_processes]
    options = {"rows": rows, "channels": channels}
    reference_loader = evaluation_loader(dataset, size, args.batch_size, args.dataloader_num_workers, **options)
    features = gather_features(
        *reconstruction_features(autoencoder, loader, extractor, None, progress, args.protocol, args.seed),
        collection_features(reference_loader, extractor, autoencoder.device, unreadable, progress),
    )
    return features, list(chain.from_iterable(gather_object([unreadable.names])))


def describe(args: argparse.Namespace, autoencoder, num_processes: int) -> dict:
    """All that the figures depend on, apart from the images."""
    return {
        "model": args.model,
        "protocol": args.protocol,
        "description": PROTOCOLS[args.protocol],
        "seed": args.seed,
        "regularization": autoencoder.config.regularization,
        "key_noise_scale": autoencoder.key_noise_scale,
        "perceptual_network": None if args.no_perceptual else args.perceptual_network,
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
    network, paper = result["perceptual_network"], result["protocol"] == "paper"
    if network is None:
        notes.append("A perceptual distance was not measured: `--no_perceptual` left it out.")
    elif "lpips" not in result["metrics"]:
        notes.append("LPIPS was not measured: its place has a distance by features of efficientnet-lite0.")
    else:
        notes.append(
            f"LPIPS is that of the network {network}" + (", not alex." if paper and network != "alex" else ".")
        )
    if paper:
        notes.append(f"The seed of the perturbation is {result['seed']}.")
    notes += _feature_notes(result)
    heading = f"# Reconstruction, protocol {result['protocol']}\n\nMean ± two standard deviations over images. "
    paragraphs = [heading + origin_sentence(result), markdown_table([row]), *notes, result["description"]]
    return "\n".join(paragraphs) + "\n"


def _feature_notes(result: dict) -> list[str]:
    """Table and remarks on the distances by learned features."""
    facts = result["feature_distances"]
    if facts is None:
        return ["rFID and KID were not computed: `--feature_extractor` chooses their features."]
    extractor, images, split = facts["extractor"], result["images"], facts["reference_split"]
    name, (rfid, kid, originals_kid) = extractor["name"], facts["metrics"].values()
    row = {
        f"rFID ({name})": f"{rfid:.4f}",
        f"KID x 1,000 ({name})": f"{kid:.4f}",
        "the real images' own KID": f"{originals_kid:.4f}",
    }
    notes = [
        f"\n{markdown_table([row])}",
        f"Features: {name}, {extractor['weights']}; images resized {extractor['resizing']}.",
        f"rFID compares {images} images with their reconstructions."
        + (f" Of fewer than {FEW_IMAGES:,} images a Fréchet distance is mostly bias." if images < FEW_IMAGES else ""),
        f"KID compares reconstructions, and the real images themselves, with {facts['reference_images']} random "
        f"images of `{split}` (seed {result['seed']}).",
    ]
    if facts["reference_unreadable"]:
        notes.append(f"{len(facts['reference_unreadable'])} more of those were unreadable and skipped.")
    if split == result["split"]:
        notes.append("Some of those may be among the measured images, as the split is the same: KID is then too low.")
    return notes


@torch.no_grad()
def picture(args: argparse.Namespace, autoencoder, dataset):
    """Some of the first images above their reconstructions."""
    channels, *size = autoencoder.sample_shape
    loader = evaluation_loader(dataset, size, NUM_PICTURES, channels=channels)
    images, rows = next(image_batches(loader, autoencoder.device, progress=False))
    return side_by_side(images, reconstruct(autoencoder, images, rows, args.protocol == "paper", args.seed))
