"""Distribution of key codes, and the precision of KL-regularised ones beside the relaxed 1 / (4 N_max) (App. D.1).

Codes are those of eval mode, without perturbation. With KL regularisation a code's precision is the standard deviation
of sigmoid(mu + std n), n ~ N(0, 1), integrated numerically for every code of every image.
"""

import argparse

from ..analysis.code_statistics import key_code_statistics
from ..analysis.plots import code_plot
from ..data import UnreadableLog
from ..metrics.reconstruction import image_batches
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help=MODEL_HELP)
    add_collection_arguments(parser, split="train")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Encodes the collection, and writes `code-statistics`."""
    device = choose_device(args.device)
    autoencoder = open_model(args.model, device)
    unreadable = UnreadableLog()
    dataset, loader = open_collection(args, autoencoder)
    statistics = key_code_statistics(autoencoder, image_batches(loader, device, unreadable, "Encoding"))
    result = {"model": args.model, "regularization": autoencoder.config.regularization}
    result |= {"key_noise_scale": autoencoder.key_noise_scale, "max_resolution": autoencoder.config.max_resolution}
    result |= collection_facts(args, dataset, autoencoder, unreadable) | statistics
    publish(args, "code-statistics", result, as_text(result), lambda: {"plot": code_plot(statistics)}, device)


def as_text(result: dict) -> str:
    """The Markdown report."""
    rows = [{"channel": index} | row for index, row in enumerate(result["channels"])]
    sentence = f"The relaxed precision 1 / (4 * {result['max_resolution']}) is {result['relaxed_precision']:.4g}.\n"
    precision = result.get("precision")
    if precision is not None:
        sentence += (
            f"With KL regularisation, codes have a precision of {precision['mean']:.4g} on average, from "
            f"{precision['min']:.4g} to {precision['max']:.4g}; {precision['above_relaxed']:.1%} are less exact than "
            "the relaxed ones.\n"
        )
    heading = "# Key codes\n\n" + origin_sentence(result)
    note = "`near_zero` and `near_one` are shares of codes within 1/256 of 0 and 1.\n"
    return "\n".join([heading, markdown_table(rows), note, sentence])
