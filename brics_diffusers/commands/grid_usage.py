"""How often each entry of the feature grids is read when a collection is decoded, and the same for a VQ codebook.

Images are encoded without perturbation; a pixel hits the corners of its cell that have a weight above zero, at every
level. Counted are stored entries: where a level shares entries among nodes, an entry has the hits of all its nodes.
The variance is that of hits divided by their mean; the histograms of plot and JSON file count used entries by the
decimal logarithm of that quotient.
"""

import argparse

from diffusers import VQModel

from ..analysis.grid_usage import (
    collection_codebook_hits,
    collection_entry_hits,
    hit_statistics,
    usage_by_group_and_level,
)
from ..analysis.plots import usage_plot
from ..data import UnreadableLog
from ..metrics.reconstruction import image_batches
from ..utils.reports import markdown_table
from ..utils.safe_loading import load_class_safely
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help=MODEL_HELP)
    add_collection_arguments(parser, split="train")
    parser.add_argument("--vq_model", help="A saved diffusers VQModel, to count its codebook with the same images.")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Counts, and writes `grid-usage`."""
    device = choose_device(args.device)
    autoencoder = open_model(args.model, device)
    vq_model = None if args.vq_model is None else open_vq_model(args.vq_model, autoencoder.config.in_channels, device)
    unreadable = UnreadableLog()
    dataset, loader = open_collection(args, autoencoder)

    hits = collection_entry_hits(autoencoder, image_batches(loader, device, unreadable, "Counting entries"))
    usage = usage_by_group_and_level(autoencoder.grids, hits)
    codebook = None
    if vq_model is not None:
        batches = image_batches(loader, device, unreadable, "Counting codes")
        codebook = hit_statistics(collection_codebook_hits(vq_model, batches))

    facts = collection_facts(args, dataset, autoencoder, unreadable)
    result = {"model": args.model, "vq_model": args.vq_model, "counted": "entries"} | facts
    result |= {"grid_type": autoencoder.config.grid_type, "grids": usage, "codebook": codebook}
    publish(args, "grid-usage", result, as_text(result), lambda: {"plot": usage_plot(usage, codebook)}, device)


def open_vq_model(name_or_path: str, expected: int, device) -> VQModel:
    """The model of `--vq_model`; a `ValueError` for one that does not encode images of so many channels."""
    vq_model = load_class_safely(VQModel, name_or_path)
    channels = vq_model.config.in_channels
    if channels != expected:
        raise ValueError(
            f"--vq_model {name_or_path} takes images of {channels} channels, the autoencoder of {expected}; name one "
            "for the same images."
        )
    return vq_model.to(device)


def as_text(result: dict) -> str:
    """The Markdown report."""
    usage = result["grids"]
    totals = [{"table": "feature grids"} | usage["total"]]
    if result["codebook"] is not None:
        totals.append({"table": f"VQ codebook of `{result['vq_model']}`"} | result["codebook"])
    shared = sum(level["shared"] for level in usage["levels"])
    note = (
        f"Counted by entry; {shared} of {len(usage['levels'])} levels share entries among nodes. The variance is that "
        "of hits divided by their mean.\n"
    )
    shares = {}
    for row in usage["groups_and_levels"]:
        shares.setdefault(row["group"], {"group": row["group"]})[f"level {row['level']}"] = row["used"]
    paragraphs = ["# Use of the feature grids\n\n" + origin_sentence(result), note]
    paragraphs += [figures_table(rows) for rows in (totals, usage["levels"], usage["groups"])]
    paragraphs += ["Share of the entries used:\n", markdown_table(list(shares.values()))]
    return "\n".join(paragraphs)


def figures_table(rows: list[dict]) -> str:
    """A table of everything but the histograms."""
    return markdown_table([{name: row[name] for name in row if name != "histogram"} for row in rows])
